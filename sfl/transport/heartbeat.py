"""Signs of life: a thread that speaks when nothing else is said.

A peer that computes for an hour is not dead, and one behind a link that silently drops everything
is not alive. So both ends of a connection say that they are there, whatever their main thread does,
and whoever hears nothing for ``--peer-timeout`` takes the connection for lost. When they register
they tell each other how often they want to hear something; before that nothing is said.
"""

import threading
from collections.abc import Callable, Iterable

from sfl.wire.members import Channel

LONGEST_INTERVAL_S = 10.0
LONGEST_PAUSE_S = 0.5  # until a new connection is noticed
BEATS_IN_A_TIMEOUT = 4  # so that one that is late does no harm


def interval_s(timeout_s: float) -> float:
    """Return how often to speak to a peer that waits for so long."""
    return min(timeout_s / BEATS_IN_A_TIMEOUT, LONGEST_INTERVAL_S)


class Heartbeat:
    """Speaks over connections on which we have been silent. Closed by ``with``."""

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
        """Fall silent."""
        self._ended.set()
        self._thread.join(LONGEST_PAUSE_S)  # not for one that waits for a peer that takes nothing

    def _beat(self) -> None:
        pause_s = 0.0
        while not self._ended.wait(pause_s):
            pause_s = LONGEST_PAUSE_S
            for connection in self._connections():
                connection.beat(connection.heartbeat_s / 2)
                pause_s = min(pause_s, connection.heartbeat_s / 2)
