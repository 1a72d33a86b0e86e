"""A connection whose messages a ``SocketReader``'s thread reads ahead.

Read-ahead is bounded: reading pauses while the inbox is full, and TCP slows the sender down.
Sending does not block: what the socket does not accept at once, the connection's writer thread
sends. The outbox is bounded too: a peer's next message is not delivered while a reply is unsent.
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
READS_AT_ONCE = 64  # of one connection before the next is read
MESSAGES_AT_ONCE = 64  # likewise: heartbeats never fill the inbox


@dataclass(frozen=True)
class Reading:
    """What the connections of a network share."""

    reader: SocketReader
    arrivals: Arrivals["BufferedConnection"]
    timeout_s: float
    limits: Limits


class BufferedConnection(Connection, Member):
    """A connection that is read ahead. Receiving takes from the inbox; sending never blocks."""

    def __init__(
        self, stream: Stream, reading: Reading, pending: PendingConnection | None = None
    ) -> None:
        """``pending``: the same connection before it was admitted."""
        decoder = pending.decoder if pending else None
        super().__init__(
            stream, timeout_s=reading.timeout_s, limits=reading.limits, decoder=decoder
        )
        self.accepted_at = time.monotonic()
        self._reader, self._arrivals = reading.reader, reading.arrivals
        self._lock, self._changed = self._reader.lock, self._reader.changed
        self._inbox: deque[tuple[int, Message]] = deque()
        self._outbox: deque[list[memoryview]] = deque()
        self._writer: threading.Thread | None = None  # started when the socket is full
        self._is_writing = False  # whether the writer is sending the outbox's first entry
        self._failure: SflError | None = None
        self._discards = False
        self._unregistered = False
        self.is_assigned = pending is None
        if pending:
            self.must_prove, self.proved = pending.must_prove, pending.proved
            self.certificate, self.counters = pending.certificate, pending.counters
            self._deliver(list(pending.arrived))
        try:
            self._reader.add(self)
        except BaseException:
            self._arrivals.forget(self)
            raise

    def fileno(self) -> int:
        return self._stream.sock.fileno()

    @property
    def arrived(self) -> bool:
        """Whether a message can be taken, or the connection has failed."""
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

    def send_heartbeat(self, silent_s: float) -> None:
        if not (self._outbox or self._failure):  # a non-empty outbox is a sign of life
            super().send_heartbeat(silent_s)

    def read_now(self) -> bool:
        received: list[Message] = []
        try:
            return self._read_some(received)
        except BlockingIOError:
            return False
        except Exception as error:  # noqa: BLE001 - _next raises it
            self._reader.pause(self)
            self._deliver(received)
            self._fail(error)
            return False
        finally:
            self._deliver(received)

    def _read_some(self, received: list[Message]) -> bool:
        """Read messages into ``received``; return False when the inbox is full, else True."""
        num_seen = 0
        for _ in range(READS_AT_ONCE):
            while not self._is_full(len(received)):
                if (message := self._decoded()) is None:
                    break
                num_seen += 1
                if not self._is_handled(message):
                    received.append(message)
            else:
                if self._deliver(received):
                    return False
                continue  # a thread has taken some in the meantime
            if num_seen > MESSAGES_AT_ONCE:
                return True
            self._read(wait=False)
        return True

    def _is_handled(self, message: Message) -> bool:
        """Return whether a message needs no receiver: heartbeats, and notices, which are passed on.

        A conversation that is resumed receives without blocking the others: so what lies in the
        inbox is what it waits for.
        """
        if message.type is MessageType.HEARTBEAT:
            return True
        if is_notice := self._is_notice(message):
            self._count_received(message)
            self.counters.messages_received += 1
        return is_notice

    def _deliver(self, received: list[Message]) -> bool:
        """Move messages to the inbox; return whether it is full, which pauses reading."""
        self.counters.messages_received += len(received)
        self.num_received += len(received)
        with self._lock:
            if received and not self._discards:
                now = time.monotonic_ns()
                self._inbox.extend((now, message) for message in received)
                self._arrivals.add(self)
                self._reader.notify()
            received.clear()
            if is_full := self._is_full():
                self._reader.pause(self)
            return is_full

    def _fail(self, error: Exception) -> None:
        """Record why the connection failed."""
        with self._lock:
            lost = ConnectionLost(f"{self.peer_title}: {reason_of(error)}")
            self._failure = error if isinstance(error, SflError) else lost
            # The writer completes the message that it is sending: it may be our last.
            while len(self._outbox) > self._is_writing and not self._discards:
                self._outbox.pop()
            self._arrivals.add(self)
            self._reader.notify()

    def _send(self, message: Message) -> int:
        if message.type is MessageType.MESSAGE and self._outbox:
            return 0  # a slow peer misses notices for the user
        return super()._send(message)

    def _transmit(self, parts: list[memoryview], *, wait: bool = False) -> None:
        """Send what the socket accepts without blocking; leave the rest to the writer."""
        with self._lock:
            behind = bool(self._outbox)
        try:
            if not behind:
                super()._transmit(parts, wait=False)
        except ConnectionLost:
            # The peer may have sent its reason before it closed; a full inbox is not read.
            self._reader.wait(lambda: self._failure is not None or self._is_full(), FAREWELL_S)
            why = self.end_reason()
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
            self._stream.shut_sending()
            with self._lock:
                self._is_writing = False
                self._outbox.clear()
                if not (self._inbox and self._inbox[-1][1].type in LAST_WORDS):
                    self._inbox.clear()  # its requests cannot be answered any more
                self._fail(error)

    def end_reason(self) -> SflError | None:
        if self._inbox and is_last(self._inbox[-1][1]):
            return self.peer_failed(self._inbox[-1][1])
        return None if self._unregistered else self._failure

    def _next(self) -> Message:
        def is_ready() -> bool:
            return bool(self._inbox) or self._failure is not None

        if not (is_ready() or self._reader.wait(is_ready, self.timeout_s)):
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
            self._resume_reading()
        return message

    def _resume_reading(self) -> None:
        self.heard_at = time.monotonic()  # paused time does not count as silence
        self._reader.resume(self)

    def arrival_ns(self) -> int:
        """Return when the first waiting message arrived; 0 for a failure, which sorts first."""
        return self._inbox[0][0] if self._inbox else 0

    def end_sending(self, message_type: MessageType, reason: str) -> None:
        with self._lock:
            self._discards = True
            self._inbox.clear()
            self._reader.notify()
        self._resume_reading()
        with contextlib.suppress(SflError):
            self.send_message_as_json(message_type, content=one_line(reason))
        self._reader.wait(lambda: not self._outbox, FAREWELL_S)
        self._stream.shut_sending()

    def last_words(self) -> PeerFailed | None:
        why = self.end_reason()
        return why if isinstance(why, PeerFailed) else None

    def dismiss(self, message_type: MessageType, reason: str) -> None:
        self.end_sending(message_type, reason)
        self.join(time.monotonic() + FAREWELL_S)

    def close_gracefully(self) -> None:
        self._reader.wait(lambda: not self._outbox, FAREWELL_S)
        self._stream.shut_sending()
        with self._lock:
            self._discards = True
            self._inbox.clear()
        self._resume_reading()
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
        # Free a partly received file, even if the closed connection is still referenced.
        self._decoder.forget()
        super().close()
