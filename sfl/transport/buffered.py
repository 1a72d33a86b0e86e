"""A connection whose messages are read ahead by the thread of a ``SocketReader``.

What is read ahead is bounded: a connection whose messages nobody takes is no longer read, and TCP
holds the sender back. What the peer is slow to take is sent on by a thread of the connection, so
that no peer waits for another one's link. That is bounded, too: no message of a peer counts as
arrived while its answer to an earlier one is unsent.
"""

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass

from sfl.errors import ConnectionLost, PeerFailed, SflError, reason_of
from sfl.transport.arrivals import Arrivals
from sfl.transport.connection import FAREWELL_S, Connection
from sfl.transport.pending import PendingConnection
from sfl.transport.socket_reader import SocketReader
from sfl.transport.stream import Stream
from sfl.wire.link import LAST_WORDS, is_last, one_line
from sfl.wire.members import Member
from sfl.wire.messages import Limits, Message, MessageType

READ_AHEAD_MESSAGES = 4  # a step's two files, twice
READS_AT_ONCE = 64  # of one connection, before it is another one's turn
MESSAGES_AT_ONCE = 64  # heartbeats, of which none wait


@dataclass(frozen=True)
class Reading:
    """Who reads the connections of a network, where what came is noted, and what is accepted."""

    reader: SocketReader
    arrivals: Arrivals["BufferedConnection"]
    timeout_s: float
    limits: Limits


class BufferedConnection(Connection, Member):
    """A connection that is read ahead; receiving takes what has been read. Sending never waits."""

    def __init__(
        self, stream: Stream, reading: Reading, let_in: PendingConnection | None = None
    ) -> None:
        """``let_in`` is what the connection was while it had to show who it is."""
        decoder = let_in.decoder if let_in else None
        super().__init__(
            stream, timeout_s=reading.timeout_s, limits=reading.limits, decoder=decoder
        )
        self.accepted_at = time.monotonic()
        self._reader, self._arrivals = reading.reader, reading.arrivals
        self._lock, self._changed = self._reader.lock, self._reader.changed
        self._inbox: deque[tuple[int, Message]] = deque()
        self._outbox: deque[list[memoryview]] = deque()
        self._writer: threading.Thread | None = None  # started when the peer is slow
        self._is_writing = False  # whether the writer sends what stands first in the outbox
        self._failure: SflError | None = None
        self._discards = False
        self._unregistered = False
        if let_in:
            self.must_prove, self.proved = let_in.must_prove, let_in.proved
            self.certificate, self.counters = let_in.certificate, let_in.counters
            self._deliver(list(let_in.arrived))
        try:
            self._reader.add(self)
        except BaseException:
            self._arrivals.forget(self)
            raise

    def fileno(self) -> int:
        return self._stream.sock.fileno()

    @property
    def arrived(self) -> bool:
        """Whether a message may be taken, or the connection has failed."""
        return bool(self._inbox and not self._outbox) or self._failure is not None

    def has_sent(self) -> bool:
        return not self._outbox or self._failure is not None

    def age_s(self) -> float:
        return time.monotonic() - self.accepted_at

    def _is_full(self, num_more: int = 0) -> bool:
        return len(self._inbox) + num_more >= READ_AHEAD_MESSAGES and not self._discards

    def silent_s(self) -> float:
        return 0.0 if self._is_full() else time.monotonic() - self.heard_at

    def check_silence(self) -> None:
        if self._failure is None and self.silent_s() > self.timeout_s:
            self._reader.pause(self)
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
            self._reader.pause(self)
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
                self._reader.notify()
            came.clear()
            if is_full := self._is_full():
                self._reader.pause(self)
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
            self._reader.notify()

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
            self._reader.wait(lambda: self._failure is not None, FAREWELL_S)
            why = self.ending()
            if isinstance(why, PeerFailed):
                raise why from None
            raise
        if not (any(map(len, parts)) or self._stream.has_unsent):
            return
        with self._lock:
            self._outbox.append(parts)
            self._reader.notify()
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
                    self._reader.notify()
        except Exception as error:  # noqa: BLE001 - the thread's edge; _next raises it
            self._stream.shut_sending()  # so that nothing more is left to wait
            with self._lock:
                self._is_writing = False
                self._outbox.clear()
                if not (self._inbox and self._inbox[-1][1].type in LAST_WORDS):
                    self._inbox.clear()  # what it asks for cannot be answered any more
                self._fail(error)

    def ending(self) -> SflError | None:
        if self._inbox and is_last(self._inbox[-1][1]):
            return self.peer_failed(self._inbox[-1][1])
        return None if self._unregistered else self._failure

    def _next(self) -> Message:
        def came() -> bool:
            return bool(self._inbox) or self._failure is not None

        if not (came() or self._reader.wait(came, self.timeout_s)):
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
        self._reader.resume(self)

    def arrival_ns(self) -> int:
        """Return when the waiting message came; failures come first."""
        return self._inbox[0][0] if self._inbox else 0

    def end_sending(self, message_type: MessageType, reason: str) -> None:
        with self._lock:
            self._discards = True
            self._inbox.clear()
            self._reader.notify()
        self._read_on()
        with contextlib.suppress(SflError):
            self.send_message_as_json(message_type, content=one_line(reason))
        self._reader.wait(lambda: not self._outbox, FAREWELL_S)
        self._stream.shut_sending()

    def last_words(self) -> PeerFailed | None:
        why = self.ending()
        return why if isinstance(why, PeerFailed) else None

    def dismiss(self, message_type: MessageType, reason: str) -> None:
        self.end_sending(message_type, reason)
        self.join(time.monotonic() + FAREWELL_S)

    def part(self) -> None:
        self._reader.wait(lambda: not self._outbox, FAREWELL_S)
        self._stream.shut_sending()
        with self._lock:
            self._discards = True
            self._inbox.clear()
        self._read_on()
        self.join(time.monotonic() + FAREWELL_S)

    def join(self, deadline: float) -> None:
        """Wait for the peer to close, until ``deadline`` at the latest; then close."""
        self._reader.wait(lambda: self._failure is not None, max(deadline - time.monotonic(), 0))
        self.close()
        if self._writer is not None:
            self._writer.join()

    def close(self) -> None:
        self._reader.remove(self)
        with self._lock:
            self._arrivals.forget(self)
        # Nobody reads any more; whoever still holds a lost connection holds no half of a file.
        self._decoder.forget()
        super().close()
