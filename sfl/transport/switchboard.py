"""Many connections at a server, and one place to wait for them all.

``doorstep`` lets them in, ``drain`` reads whole messages ahead of the training, which takes them in
the main thread. What is read ahead is bounded: a connection whose messages nobody takes is no
longer read, and TCP holds the sender back. What a client is slow to take is sent on by a thread of
its connection, so that no client waits for another one's link. That is bounded, too: no message of
a client is taken while its answer to an earlier one is unsent.
"""

import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import TypeVar

from sfl.errors import ConnectionLost, PeerFailed, SflError, reason_of
from sfl.transport.connection import FAREWELL_S, Connection
from sfl.transport.dialling import Listener
from sfl.transport.doorstep import Doorstep, Visitor
from sfl.transport.drain import Drain
from sfl.transport.guard import Guard
from sfl.transport.heartbeat import Heart, interval_s
from sfl.transport.turned_away import TurnedAway
from sfl.wire.driver import Gate, Network
from sfl.wire.link import LAST_WORDS, Link, is_last, one_line
from sfl.wire.messages import Limits, Message, MessageType

T = TypeVar("T")
READ_AHEAD_MESSAGES = 4  # a step's two files, twice
READS_AT_ONCE = 64  # of one connection, before it is another one's turn
MESSAGES_AT_ONCE = 64  # heartbeats, of which none wait


class DrainedConnection(Connection):
    """A connection that is read ahead; receiving takes what has been read.

    Sending never waits for the peer. While something waits to be sent, no message counts as
    arrived: a peer that does not take its answer gets no further one.
    """

    def __init__(
        self,
        visitor: Visitor,
        drain: Drain,
        arrivals: "Arrivals",
        *,
        timeout_s: float,
        limits: Limits,
    ) -> None:
        super().__init__(
            visitor.stream, timeout_s=timeout_s, limits=limits, decoder=visitor.decoder
        )
        self.must_prove, self.proved = visitor.must_prove, visitor.proved
        self.certificate = visitor.certificate
        self.counters = visitor.counters
        self.accepted_at = time.monotonic()
        self.settled = False  # only its end, and messages that are waited for, are of interest
        self.dropped = False  # nothing is
        self._drain, self._arrivals = drain, arrivals
        self._lock, self._changed = drain.lock, drain.changed
        self._inbox: deque[tuple[int, Message]] = deque()
        self._outbox: deque[list[memoryview]] = deque()
        self._writer: threading.Thread | None = None  # started when the peer is slow
        self._is_writing = False  # whether the writer sends what stands first in the outbox
        self._failure: SflError | None = None
        self._discards = False
        self._unregistered = False
        self._deliver(list(visitor.arrived))
        try:
            drain.add(self)
        except BaseException:
            arrivals.forget(self)
            raise

    def fileno(self) -> int:
        return self._stream.sock.fileno()

    @property
    def arrived(self) -> bool:
        """Whether a message may be taken, or the connection has failed."""
        return bool(self._inbox and not self._outbox) or self._failure is not None

    def has_sent(self) -> bool:
        return not self._outbox or self._failure is not None

    @property
    def failed(self) -> bool:
        """Whether the peer takes no further part."""
        return self.ending() is not None

    def age_s(self) -> float:
        """Return for how long we have been connected."""
        return time.monotonic() - self.accepted_at

    def _is_full(self, num_more: int = 0) -> bool:
        return len(self._inbox) + num_more >= READ_AHEAD_MESSAGES and not self._discards

    def silent_s(self) -> float:
        """Return for how long the peer has sent nothing that we would have read."""
        return 0.0 if self._is_full() else time.monotonic() - self.heard_at

    def check_silence(self) -> None:
        if self._failure is None and self.silent_s() > self.timeout_s:
            self._drain.pause(self)
            self._fail(self._silent())

    def beat(self, silent_s: float) -> None:
        if not (self._outbox or self._failure):  # else it will hear from us, or never will
            super().beat(silent_s)

    def read_now(self) -> bool:
        came: list[Message] = []
        try:
            return self._read_some(came)
        except BlockingIOError:
            return False
        except Exception as error:  # noqa: BLE001 - _next raises it
            self._drain.pause(self)
            self._deliver(came)
            self._fail(error)
            return False
        finally:
            self._deliver(came)

    def _read_some(self, came: list[Message]) -> bool:
        """Read messages; return False if no more of them are wanted, True if there may be more."""
        num_seen = 0
        for _ in range(READS_AT_ONCE):
            while not self._is_full(len(came)):
                if (message := self._decoded()) is None:
                    break
                num_seen += 1
                if message.type is not MessageType.HEARTBEAT:
                    came.append(message)
            else:
                if self._deliver(came):
                    return False
                continue  # somebody has taken some in the meantime
            if num_seen > MESSAGES_AT_ONCE:
                return True
            self._read(wait=False)
        return True

    def _deliver(self, came: list[Message]) -> bool:
        """Put messages, which came together, where they are taken from.

        Return whether there is no place for more: then nothing is read until some are taken.
        """
        self.counters.messages_received += len(came)
        self.num_came += len(came)
        with self._lock:
            if came and not self._discards:
                now = time.monotonic_ns()
                self._inbox.extend((now, message) for message in came)
                self._arrivals.add(self)
                self._drain.notify()
            came.clear()
            if is_full := self._is_full():
                self._drain.pause(self)
            return is_full

    def _fail(self, error: Exception) -> None:
        """Note, at a thread's edge, why the connection is of no further use."""
        with self._lock:
            lost = ConnectionLost(f"{self.peer_title}: {reason_of(error)}")
            self._failure = error if isinstance(error, SflError) else lost
            # The writer ends what it has begun, and sends our last words.
            while len(self._outbox) > self._is_writing and not self._discards:
                self._outbox.pop()
            self._arrivals.add(self)
            self._drain.notify()

    def _send(self, message: Message) -> int:
        if message.type is MessageType.MESSAGE and self._outbox:
            return 0  # a notice for people: who does not keep up goes without
        return super()._send(message)

    def _transmit(self, parts: list[memoryview], *, wait: bool = False) -> None:
        """Send at once what the socket takes at once; leave the rest to the writer."""
        with self._lock:
            behind = bool(self._outbox)
        try:
            if not behind:
                super()._transmit(parts, wait=False)
        except ConnectionLost:
            # The peer may have said why before it closed.
            self._drain.wait(lambda: self._failure is not None, FAREWELL_S)
            why = self.ending()
            if isinstance(why, PeerFailed):
                raise why from None
            raise
        if not (any(map(len, parts)) or self._stream.has_unsent):
            return
        with self._lock:
            self._outbox.append(parts)
            self._drain.notify()
        if self._writer is None or not self._writer.is_alive():
            self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
            self._writer.start()

    def _write(self) -> None:
        try:
            while True:
                with self._lock:
                    self._changed.wait_for(lambda: self._outbox or self._failure or self._discards)
                    if not self._outbox:
                        return
                    parts, self._is_writing = self._outbox[0], True
                super()._transmit(parts)
                with self._lock:
                    self._outbox.popleft()
                    self._is_writing = False
                    if self._inbox:
                        self._arrivals.add(self)
                    self._drain.notify()
        except Exception as error:  # noqa: BLE001 - the thread's edge; _next raises it
            self._stream.shut_sending()  # so that nothing more is left to wait
            with self._lock:
                self._is_writing = False
                self._outbox.clear()
                if not (self._inbox and self._inbox[-1][1].type in LAST_WORDS):
                    self._inbox.clear()  # what it asks for cannot be answered any more
                self._fail(error)

    def ending(self) -> SflError | None:
        """Return why the peer takes no further part: its last words, or that it is gone."""
        if self._inbox and is_last(self._inbox[-1][1]):
            return self.peer_failed(self._inbox[-1][1])
        return None if self._unregistered else self._failure

    def _next(self) -> Message:
        def came() -> bool:
            return bool(self._inbox) or self._failure is not None

        if not (came() or self._drain.wait(came, self.timeout_s)):
            raise self._silent()
        with self._lock:
            if not self._inbox:
                assert self._failure is not None
                raise self._failure
            was_full = self._is_full()
            _, message = self._inbox.popleft()
            self._unregistered |= message.type is MessageType.UNREGISTER
            if self.arrived:
                self._arrivals.add(self)
        if was_full:
            self._read_on()
        return message

    def _read_on(self) -> None:
        self.heard_at = time.monotonic()  # before, we did not listen
        self._drain.resume(self)

    def arrival_ns(self) -> int:
        """Return when the waiting message came; failures come first."""
        return self._inbox[0][0] if self._inbox else 0

    def end_sending(self, message_type: MessageType, reason: str) -> None:
        with self._lock:
            self._discards = True
            self._inbox.clear()
            self._drain.notify()
        self._read_on()
        with contextlib.suppress(SflError):
            self.send_message_as_json(message_type, content=one_line(reason))
        self._drain.wait(lambda: not self._outbox, FAREWELL_S)
        self._stream.shut_sending()

    def join(self, deadline: float) -> None:
        """Wait for the peer to close, until ``deadline`` at the latest; then close."""
        self._drain.wait(lambda: self._failure is not None, max(deadline - time.monotonic(), 0))
        self.close()
        if self._writer is not None:
            self._writer.join()

    def close(self) -> None:
        self._drain.remove(self)
        # Nobody reads any more; whoever still holds a lost connection holds no half of a file.
        self._decoder.forget()
        super().close()


class Arrivals:
    """The connections of which something has arrived; guarded by ``Drain.lock``."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, DrainedConnection]] = []
        self._count = itertools.count()
        self._news: dict[DrainedConnection, None] = {}

    def add(self, connection: DrainedConnection) -> None:
        """Take note that something new stands first, or last, in what waits of a connection."""
        if connection.dropped:
            return
        heapq.heappush(self._heap, (connection.arrival_ns(), next(self._count), connection))
        if connection.failed or not connection.settled:
            self._news[connection] = None

    def forget(self, connection: DrainedConnection) -> None:
        connection.dropped = True
        self._news.pop(connection, None)
        self._heap = [entry for entry in self._heap if entry[2] is not connection]
        heapq.heapify(self._heap)

    def first(self, links: Collection[Link]) -> DrainedConnection | None:
        """Return the link whose message has waited longest, or that has failed."""
        others, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            when, _, connection = entry
            if connection.arrived and connection.arrival_ns() == when:
                others.append(entry)
                found = connection if connection in links else None
        for entry in others:
            heapq.heappush(self._heap, entry)
        return found

    def news(self) -> list[DrainedConnection]:
        """Return those that have failed, and those not yet settled of which something waits."""
        if not self._news:
            return []
        self._news = {c: None for c in self._news if c.failed or (c.arrived and not c.settled)}
        return list(self._news)


class Switchboard(Network):
    """A listening socket and the connections that came over it. Closed by ``with``."""

    def __init__(
        self,
        listener: Listener,
        *,
        timeout_s: float,
        limits: Limits,
        max_strangers: int = 64,
        heartbeat_s: float | None = None,
        guard: Guard | None = None,
        turned_away: TurnedAway | None = None,
    ) -> None:
        """``guard`` says who is let in; ``turned_away`` is told who is not, and why.

        ``max_strangers`` may then be connected without having registered; more are just closed. We
        want to hear from who has registered every ``heartbeat_s``.
        """
        self.heartbeat_s = heartbeat_s or interval_s(timeout_s)
        self.guard = guard or Guard()
        self._max_strangers = max_strangers
        self._timeout_s = timeout_s
        self._limits = limits
        self._drain, self._arrivals = Drain(), Arrivals()
        self._lock = self._drain.lock
        self._connections: list[DrainedConnection] = []
        self._num_leaving = 0  # connections that were turned away and are being closed
        self._closed = False
        self.turned_away = turned_away or TurnedAway()
        self._doorstep = Doorstep(listener, self.guard, self._admit, self.turned_away)
        self._heart = Heart(lambda: [c for c in self.connections if c.peer_name])

    def __enter__(self) -> "Switchboard":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end("the server has ended")

    @property
    def connections(self) -> list[DrainedConnection]:
        """Return the open connections."""
        with self._lock:
            return list(self._connections)

    def _admit(self, visitor: Visitor) -> None:
        with self._lock:
            strangers = [c for c in self._connections if not c.peer_name]
            if len(strangers) + self._num_leaving >= self._max_strangers:
                visitor.stream.close()
                return
        connection = DrainedConnection(
            visitor, self._drain, self._arrivals, timeout_s=self._timeout_s, limits=self._limits
        )
        with self._lock:
            self._connections.append(connection)
            self._drain.notify()  # its first message has arrived already

    def wait_for_any(self, timeout_s: float) -> list[DrainedConnection]:
        """Return the connections that have a message or have failed; none after ``timeout_s``."""
        return self._drain.wait(lambda: [c for c in self._connections if c.arrived], timeout_s)

    def until(self, ready: Callable[[], T | None], timeout_s: float | None = None) -> T | None:
        """Return what ``ready`` finds once it finds something; None after ``timeout_s``.

        It is asked whenever a connection, or ``wake``, gives reason to.
        """
        return self._drain.wait(ready, timeout_s)

    def wake(self) -> None:
        """Let ``wait`` look at its gates again; called from other threads."""
        with self._lock:
            self._drain.notify()

    def wait(self, links: Collection[Link], gates: Collection[Gate] = ()) -> Link | None:
        """Return the one of ``links`` whose message has waited longest, or that has failed.

        None if a gate opens first.

        Raises:
            ConnectionLost, PeerFailed: another client, which is not being waited for, has ended.
        """

        def ended() -> SflError | None:
            others = (c for c in self.news() if c.peer_name and c not in links)
            return next(filter(None, (other.ending() for other in others)), None)

        self._drain.wait(lambda: self.first(links) or ended() or any(g() for g in gates))
        if why := ended():
            raise why
        return self.first(links)

    def first(self, links: Collection[Link]) -> DrainedConnection | None:
        """Return the one of ``links`` whose message has waited longest, or that has failed."""
        with self._lock:
            return self._arrivals.first(links)

    def news(self) -> list[DrainedConnection]:
        """Return connections that have failed, and strangers of whom a message waits."""
        with self._lock:
            return self._arrivals.news()

    def drop(
        self,
        connection: DrainedConnection,
        reason: str,
        last_words: MessageType = MessageType.INVALID_MESSAGE,
    ) -> None:
        """Turn one connection away, leaving it the time to read why."""
        with self._lock:
            if connection not in self._connections:
                return
            self._connections.remove(connection)
            self._arrivals.forget(connection)
            self._num_leaving += 1
        arguments = connection, reason, last_words
        threading.Thread(target=self._say_farewell, args=arguments, daemon=True).start()

    def _say_farewell(
        self, connection: DrainedConnection, reason: str, last_words: MessageType
    ) -> None:
        try:
            connection.end_sending(last_words, reason)
            connection.join(time.monotonic() + FAREWELL_S)
        finally:
            with self._lock:
                self._num_leaving -= 1
                self._drain.notify()

    def end(self, reason: str, last_words: MessageType = MessageType.ABORT) -> None:
        """Stop listening and close every connection, telling those still open why."""
        if self._closed:
            return
        self._closed = True
        self._heart.stop()
        self._doorstep.close()
        deadline = time.monotonic() + FAREWELL_S
        for connection in self.connections:
            connection.end_sending(last_words, reason)
        for connection in self.connections:
            connection.join(deadline)
        self._drain.wait(lambda: not self._num_leaving, FAREWELL_S)
        self._drain.close()
