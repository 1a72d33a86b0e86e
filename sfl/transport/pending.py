"""A connection that has not shown yet who it is.

It is let in when it has done TLS's handshake, where there is TLS, and has proved that it has the
token, where there is one, or else has sent a first whole message. Until then it may send 4 KiB, has
10 seconds, and never gets a thread, a file or the attention of whoever trains.
"""

import contextlib
import socket
import ssl
import time
from collections import deque

from sfl.errors import AuthError, ConnectionLost, ProtocolError, SflError
from sfl.transport.addresses import address_of
from sfl.transport.connection import FAREWELL_S
from sfl.transport.guard import Guard
from sfl.transport.stream import RAW_BYTES, Stream, TlsStream, speaks_tls, why
from sfl.transport.tokens import server_authenticate
from sfl.wire.driver import Conversation
from sfl.wire.framing import HEAD, VERSION, Decoder, encode_head
from sfl.wire.link import Link, Peer, one_line
from sfl.wire.messages import Limits, Message, MessageType

MAX_BYTES = 4096  # that a connection may send before it is let in
MAX_RAW_BYTES = 64 * 2**10  # the same with all that TLS adds: certificates, most of all
LET_IN_WITHIN_S = 10.0
LIMITS = Limits(json_bytes=MAX_BYTES - HEAD.size)


class PendingConnection(Link):
    """A connection that is not let in yet."""

    def __init__(self, sock: socket.socket, guard: Guard) -> None:
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
