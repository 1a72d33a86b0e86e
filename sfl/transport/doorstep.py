"""Connections that have not shown yet who they are: one thread for all, and little for each.

A connection is let in when it has done TLS's handshake, where there is TLS, and has proved that it
has the token, where there is one, or else has sent a first whole message. Until then it may send
4 KiB, has 10 seconds, and never gets a thread, a file or the attention of whoever trains. When too
many wait, one of them, drawn at random, makes room: so those who never come to the point cannot
keep out those who do.
"""

import contextlib
import random
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable

from sfl.errors import (
    AuthError,
    ConnectionLost,
    Damaged,
    OtherVersion,
    ProtocolError,
    SflError,
    reason_of,
)
from sfl.transport.connection import FAREWELL_S, Socket, address_of
from sfl.transport.dialling import Listener
from sfl.transport.guard import Guard
from sfl.transport.stream import RAW_BYTES, Stream, TlsStream, speaks_tls, why
from sfl.transport.tokens import server_authenticate
from sfl.transport.turned_away import TurnedAway
from sfl.wire.driver import Conversation
from sfl.wire.framing import HEAD, RELEASES, VERSION, Decoder, encode_head
from sfl.wire.link import Link, Peer, last_words_for, one_line
from sfl.wire.messages import Limits, Message, MessageType

MAX_BYTES = 4096  # that a connection may send before it is let in
MAX_RAW_BYTES = 64 * 2**10  # the same with all that TLS adds: certificates, most of all
LET_IN_WITHIN_S = 10.0
ACCEPTED_PER_S = 1000  # at most; more wait in the system's queue, and leave us time to train
ACCEPTED_AT_ONCE = 16
LOOK_EVERY_S = 0.25  # at the time
LIMITS = Limits(json_bytes=MAX_BYTES - HEAD.size)


class Visitor(Link):
    """A connection that is not let in yet."""

    def __init__(self, sock: Socket, guard: Guard) -> None:
        super().__init__(guard.listener)
        sock.settimeout(0)
        self.address = address_of(sock)
        self.decoder = Decoder(LIMITS)
        self.arrived: deque[Message] = deque()
        self.deadline = time.monotonic() + LET_IN_WITHIN_S
        self.leaves = False  # it has been told why it is not let in
        self.must_prove = guard.tokens is not None
        self.version = VERSION  # of the protocol that it reads
        self.stream = Stream(sock)
        self._tls = guard.tls
        self._talk = self._show(guard)
        next(self._talk)

    def go_on(self) -> bool:
        """Go on with what has come; return whether it is let in.

        Raises:
            AuthError, ProtocolError: it is not.
            ConnectionLost, OSError: it is gone.
        """
        try:
            if not self._is_secured():
                return False
            while True:
                self._receive()
                while (message := self.decoder.next_message()) is not None:
                    self.arrived.append(message)
                    if self._takes_the_last_step():
                        return True
        except BlockingIOError:  # by what reads alone: nothing more has come
            return False

    def _takes_the_last_step(self) -> bool:
        """Go on with the talk; return whether it has come to its good end."""
        try:
            next(self._talk)
        except StopIteration as end:
            self.proved = end.value
            if self.must_prove and self.proved is None:  # never, unless the talk ended otherwise
                raise AuthError("has not proved who it is") from None
            return True
        return False

    def _is_secured(self) -> bool:
        """Go on with TLS's handshake, where there is TLS; return whether it is done."""
        if self._tls is None or (isinstance(self.stream, TlsStream) and self.stream.is_secured):
            return True
        if not isinstance(self.stream, TlsStream):
            if not speaks_tls(self.stream.sock):
                raise AuthError("this server speaks TLS alone: give --tls-ca")
            self.stream = TlsStream(self.stream.sock, self._tls.context)
            self.certificate = self._tls.certificate
        try:
            done = self.stream.shake_hands_now()
        except ssl.SSLError as error:
            raise AuthError(f"no TLS: {why(error)}") from error
        finally:
            self._bound()
        return done

    def _bound(self) -> None:
        """See that it has neither sent too much nor left unread what it was told."""
        if self.stream.raw_received > MAX_RAW_BYTES:
            raise ConnectionLost(f"sent {self.stream.raw_received} bytes of TLS")
        if self.stream.has_unsent:
            raise ConnectionLost("takes nothing")

    def _receive(self) -> None:
        room = MAX_BYTES - self.counters.bytes_received
        if not room:
            raise ProtocolError(
                f"at most {MAX_BYTES} bytes may come before who sends them is known"
            )
        try:
            with self.decoder.get_buffer() as buffer:
                num_bytes = self.stream.receive_now(buffer[:room])
        finally:
            self._bound()
        if not num_bytes:
            raise ConnectionLost("closed the connection")
        self.decoder.advance(num_bytes)
        self.counters.bytes_received += num_bytes

    def _show(self, guard: Guard) -> Conversation[Peer | None]:
        """Find out who it is; None where nobody asks."""
        if guard.tokens is not None:
            return (
                yield from server_authenticate(
                    self, guard.tokens, listener=guard.listener, run=guard.run
                )
            )
        yield self
        if self.arrived[0].type is MessageType.AUTHENTICATE:
            raise AuthError("this server has no token: leave out --token-file, or give it one")
        return None

    def _send(self, message: Message) -> int:
        data = encode_head(message, version=self.version)
        try:
            taken = self.stream.send_now([memoryview(data)])
        except BlockingIOError:
            taken = 0
        if taken < len(data) or self.stream.has_unsent:
            raise ConnectionLost("takes nothing")
        self.counters.messages_sent += 1
        self.counters.bytes_sent += len(data)
        return len(data)

    def _next(self) -> Message:
        self.counters.messages_received += 1
        return self.arrived.popleft()

    def dismiss(self, message_type: MessageType, reason: str) -> None:
        """Say why it is not let in; what it still sends is thrown away until it closes."""
        self.leaves, self.deadline = True, time.monotonic() + FAREWELL_S
        with contextlib.suppress(OSError, SflError):
            self.send_message_as_json(message_type, content=one_line(reason))
        self.stream.shut_sending()

    def has_left(self) -> bool:
        """Throw away what has come from one that was dismissed; return whether it has closed."""
        try:
            return not self.stream.sock.recv(RAW_BYTES)
        except BlockingIOError:
            return False


class Doorstep:
    """The thread that accepts connections, and hands on those that are let in."""

    def __init__(
        self,
        listener: Listener,
        guard: Guard,
        admit: Callable[[Visitor], None],
        turned_away: TurnedAway,
    ) -> None:
        """``admit`` is given each connection that is let in; ``turned_away`` why others are not."""
        listener.do_not_wait()
        self._listener, self._guard, self._admit = listener, guard, admit
        self._turned_away = turned_away
        self._visitors: set[Visitor] = set()
        self._selector = selectors.DefaultSelector()
        self._closing, self._closed = socket.socketpair()
        self._accepts_from = self._looked_at = 0.0  # a time; the former after a crowd has come
        self._thread = threading.Thread(target=self._run, name="doorstep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and send everybody away who is not let in yet."""
        self._closing.close()
        self._thread.join()

    def _run(self) -> None:
        self._selector.register(self._closed, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in self._selector.select(min(LOOK_EVERY_S, self._pause_s)):
                    if key.fileobj is self._closed:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data in self._visitors:  # and not just sent away for another one
                        self._attend(key.data)
                self._look_at_the_time()
        finally:
            for visitor in list(self._visitors):
                self._let_go(visitor)
            self._listener.close()
            self._selector.close()
            self._closed.close()

    def _accept(self) -> None:
        """Let those who knock stand at the door, but not all of a crowd at once."""
        accepted, pause_s = 0, 0.0
        try:
            while accepted < ACCEPTED_AT_ONCE and (sock := self._listener.accept()):
                accepted += 1
                self._receive(sock)
        except OSError:  # too many files are open
            pause_s = LOOK_EVERY_S
        self._selector.unregister(self._listener)
        self._accepts_from = time.monotonic() + max(accepted / ACCEPTED_PER_S, pause_s)

    def _receive(self, sock: Socket) -> None:
        while len(self._visitors) >= self._guard.max_pending:
            self._make_room()
        try:
            visitor = Visitor(sock, self._guard)
            self._selector.register(sock, selectors.EVENT_READ, visitor)
        except OSError:
            sock.close()
            raise
        self._visitors.add(visitor)

    def _make_room(self) -> None:
        leaving = [visitor for visitor in self._visitors if visitor.leaves]
        visitor = random.choice(leaving or list(self._visitors))
        self._turned_away.add(visitor.address, "made room for others", aloud=False)
        self._let_go(visitor)

    def _attend(self, visitor: Visitor) -> None:
        """See to one of whom something has come; whatever it is, the others do not notice it."""
        try:
            if visitor.leaves:
                if visitor.has_left():
                    self._let_go(visitor)
            elif visitor.go_on():
                self._let_in(visitor)
        except Exception as error:  # noqa: BLE001 - one visitor's edge
            self._refuse(visitor, error)

    def _refuse(self, visitor: Visitor, error: Exception) -> None:
        if visitor.leaves:
            self._let_go(visitor)
            return
        aloud = isinstance(error, AuthError | ProtocolError)
        self._turned_away.add(visitor.address, reason_of(error), aloud=aloud)
        if isinstance(error, OtherVersion):
            visitor.version = error.version if error.version in RELEASES else VERSION
            visitor.dismiss(MessageType.INVALID_MESSAGE, error.answer)
        elif isinstance(error, AuthError | ProtocolError | Damaged):
            visitor.dismiss(last_words_for(error), str(error))
        else:
            self._let_go(visitor)

    def _let_in(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        self._selector.unregister(visitor.stream.sock)
        try:
            self._admit(visitor)
        except (OSError, RuntimeError):  # it is gone again, or no thread is left for it
            visitor.stream.close()

    def _let_go(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(visitor.stream.sock)
        visitor.stream.close()

    def _look_at_the_time(self) -> None:
        now = time.monotonic()
        if now >= self._accepts_from and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        for visitor in [v for v in self._visitors if now > v.deadline]:
            self._refuse(visitor, ProtocolError(f"register within {LET_IN_WITHIN_S:g} seconds"))
        self._turned_away.look_at_the_time(now)

    @property
    def _pause_s(self) -> float:
        """For how long to wait, at most, until connections are accepted again."""
        return max(self._accepts_from - time.monotonic(), 0) or LOOK_EVERY_S
