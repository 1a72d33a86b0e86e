"""Many TCP connections, read by one thread, with one call to wait for all of them."""

import threading
import time
from collections.abc import Callable, Collection
from typing import Self, TypeVar

from sfl.transport.arrivals import Arrivals
from sfl.transport.buffered import BufferedConnection, Reading
from sfl.transport.connection import FAREWELL_S
from sfl.transport.heartbeat import Heartbeat
from sfl.transport.pending import PendingConnection
from sfl.transport.socket_reader import SocketReader
from sfl.transport.stream import Stream
from sfl.wire.driver import Gate, NoReconnects
from sfl.wire.link import Link
from sfl.wire.members import Member
from sfl.wire.messages import Limits, MessageType

T = TypeVar("T")


class TcpNetwork(NoReconnects):
    """Connections, with one call to wait for all of them. Closed by ``with``."""

    farewell = "the server has ended", MessageType.ABORT  # last message to open connections

    def __init__(self, timeout_s: float, limits: Limits) -> None:
        self._reader, self._arrivals = SocketReader(), Arrivals[BufferedConnection]()
        self._reading = Reading(self._reader, self._arrivals, timeout_s, limits)
        self._lock = self._reader.lock
        self._connections: list[BufferedConnection] = []
        self._num_leaving = 0  # connections that are being closed
        self._closed = False
        self._heartbeat = Heartbeat(lambda: self.members)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end(*self.farewell)

    @property
    def members(self) -> list[BufferedConnection]:
        with self._lock:
            return [c for c in self._connections if not c.is_closed]

    def add(self, stream: Stream, pending: PendingConnection | None = None) -> BufferedConnection:
        """Read a stream; ``pending``: the same connection before it was admitted.

        Without it, the connection is ours, and assigned to whoever has made it.
        """
        connection = BufferedConnection(stream, self._reading, pending)
        with self._lock:
            self._connections = [*self.members, connection]
            self._reader.notify()  # its first message may be there already
        return connection

    def wait_until(self, ready: Callable[[], T | None], timeout_s: float | None = None) -> T | None:
        return self._reader.wait(ready, timeout_s)

    def wake(self) -> None:
        with self._lock:
            self._reader.notify()

    def wait(self, links: Collection[Link], gates: Collection[Gate] = ()) -> Link | None:
        self._reader.wait(lambda: self.first_arrived(links) or any(g() for g in gates))
        return self.first_arrived(links)

    def first_arrived(self, links: Collection[Link]) -> BufferedConnection | None:
        with self._lock:
            return self._arrivals.first_arrived(links)

    def ready_members(self) -> list[BufferedConnection]:
        with self._lock:
            return self._arrivals.ready_members()

    def drop(
        self, member: Member, reason: str, last_words: MessageType = MessageType.INVALID_MESSAGE
    ) -> None:
        with self._lock:
            if member not in self._connections:
                return
            assert isinstance(member, BufferedConnection)
            self._connections.remove(member)
            self._arrivals.forget(member)
            self._num_leaving += 1
        arguments = member, last_words, reason
        threading.Thread(target=self._dismiss, args=arguments, daemon=True).start()

    def _dismiss(self, member: Member, last_words: MessageType, reason: str) -> None:
        try:
            member.dismiss(last_words, reason)
        finally:
            with self._lock:
                self._num_leaving -= 1
                self._reader.notify()

    def end(self, reason: str, last_words: MessageType = MessageType.ABORT) -> None:
        if self._closed:
            return
        self._closed = True
        self._heartbeat.stop()
        self._stop_adding()
        deadline = time.monotonic() + FAREWELL_S
        for connection in self.members:
            connection.end_sending(last_words, reason)
        for connection in self.members:
            connection.join(deadline)
        self._reader.wait(lambda: not self._num_leaving, FAREWELL_S)
        self._reader.close()

    def _stop_adding(self) -> None:
        """Accept no new connections."""
