"""Heartbeats: a thread that sends them over idle connections.

A peer may compute for an hour, and a broken network may drop everything silently. So both ends send
heartbeats, whatever their main thread does, and a side that receives nothing for ``--peer-timeout``
treats the connection as lost. Each side announces its interval when a client registers; before that
no heartbeats are sent.

The same thread cuts off what is of no use without a peer that has gone: a client of several servers
waits for one of them at a time.
"""

import threading
from collections.abc import Callable, Iterable

from sfl.wire.members import Channel

LONGEST_INTERVAL_S = 10.0
LONGEST_PAUSE_S = 0.5  # until a new connection is noticed
BEATS_IN_A_TIMEOUT = 4  # a late one does no harm


def interval_s(timeout_s: float) -> float:
    """Return the heartbeat interval for a peer with this timeout."""
    return min(timeout_s / BEATS_IN_A_TIMEOUT, LONGEST_INTERVAL_S)


class Heartbeat:
    """Sends heartbeats over connections on which this side is idle. Closed by ``with``."""

    def __init__(self, connections: Callable[[], Iterable[Channel]]) -> None:
        self._connections = connections
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(
            LONGEST_PAUSE_S
        )  # bounded: it may be blocked by a peer that reads nothing

    def _beat(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            pause_s = LONGEST_PAUSE_S
            for connection in self._connections():
                connection.send_heartbeat(connection.heartbeat_s / 2)
                if connection.companions and connection.is_cut_off():
                    for companion in connection.companions:
                        companion.cut_off()
                pause_s = min(pause_s, connection.heartbeat_s / 2)
