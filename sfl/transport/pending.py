"""A connection that is not admitted yet.

To be admitted it completes TLS's handshake, if there is TLS, and proves that it has the token; a
server without tokens wants one complete message instead. Until then a connection may send 4 KiB,
has 10 seconds, gets no thread and no file, and takes no time of the training thread.
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
from sfl.transport.stream import RAW_BYTES, Stream, TlsStream, speaks_tls, tls_reason
from sfl.transport.tokens import server_authenticate
from sfl.wire.driver import Conversation
from sfl.wire.framing import HEAD, VERSION, Decoder, encode_head
from sfl.wire.link import Link, Peer, one_line
from sfl.wire.messages import Limits, Message, MessageType

MAX_BYTES = 4096  # received from a connection before it is admitted
MAX_RAW_BYTES = 64 * 2**10  # the same with the bytes of TLS, mostly certificates, and WebSocket
UPGRADE = b"G"  # of "GET", the first byte of a request for a WebSocket; no message of SFL begins so
LET_IN_WITHIN_S = 10.0
LIMITS = Limits(json_bytes=MAX_BYTES - HEAD.size)


class PendingConnection(Link):
    """A connection that is not admitted yet; used by the acceptor's thread alone."""

    def __init__(self, sock: socket.socket, guard: Guard) -> None:
        super().__init__(guard.listener)
        sock.settimeout(0)
        self.address = address_of(sock)
        self.decoder = Decoder(LIMITS)
        self.arrived: deque[Message] = deque()
        self.deadline = time.monotonic() + LET_IN_WITHIN_S
        self.is_dismissed = False  # whether it has been sent the reason of its refusal
        self.must_prove = guard.tokens is not None
        self.version = VERSION  # protocol version for our replies
        self.stream = Stream(sock)
        self._tls = guard.tls
        wanted = {self._start_tls: guard.tls is not None, self._start_websocket: guard.websocket}
        self._to_open = [start for start, is_wanted in wanted.items() if is_wanted]
        self._knows_how_to_answer = not self._to_open  # in the clear, or under what
        self._handshake = self._identify(guard)
        next(self._handshake)

    def process(self) -> bool:
        """Process the bytes that have arrived; return whether the connection is admitted.

        Raises:
            AuthError, ProtocolError: it is refused.
            ConnectionLost, OSError: it has disconnected.
        """
        try:
            self._open()
            while True:
                self._receive()
                while (message := self.decoder.next_message()) is not None:
                    self.arrived.append(message)
                    if self._advance_handshake():
                        return True
        except BlockingIOError:  # from reading alone: no more bytes are available
            return False

    def _advance_handshake(self) -> bool:
        """Resume the token handshake; return whether it has succeeded."""
        try:
            next(self._handshake)
        except StopIteration as end:
            self.proved = end.value
            if self.must_prove and self.proved is None:  # a safeguard: _identify never does this
                raise AuthError("has not proved who it is") from None
            return True
        return False

    def _open(self) -> None:
        """Continue the handshakes of TLS and WebSocket to their end.

        Raises:
            BlockingIOError: more bytes are needed. TLS holds none back: they would not wake us.
        """
        while self._to_open or not self.stream.is_ready:
            if self.stream.is_ready:
                self.stream = self._to_open[0](self.stream)
                del self._to_open[0]
                continue
            try:
                self.stream.do_handshake_now()
            except ssl.SSLError as error:
                raise AuthError(f"no TLS: {tls_reason(error)}") from error
            finally:
                self._check_bounds()

    def _start_tls(self, stream: Stream) -> Stream:
        assert self._tls is not None
        is_tls = speaks_tls(stream.sock)
        self._knows_how_to_answer = True
        if not is_tls:
            raise AuthError("this server speaks TLS alone: give --tls-ca")
        self.certificate = self._tls.certificate
        return TlsStream(stream.sock, self._tls.context)

    def _start_websocket(self, stream: Stream) -> Stream:
        """Start a WebSocket, unless the peer begins with a message of SFL's own."""
        from sfl.transport.websocket import accepted  # a library that few servers need

        with self.decoder.get_buffer() as buffer:
            first = bytes(buffer[: stream.receive_now(buffer[:1])])
        self._knows_how_to_answer = True
        if first == UPGRADE:
            return accepted(stream, first)
        self._take(len(first))
        return stream

    def _check_bounds(self) -> None:
        """Raise ConnectionLost if it has sent too many bytes, or does not read ours."""
        if self.stream.raw_bytes_received > MAX_RAW_BYTES:
            raise ConnectionLost(
                f"sent {self.stream.raw_bytes_received} bytes before it was admitted"
            )
        if self.stream.has_unsent:
            raise ConnectionLost("takes nothing")

    def _receive(self) -> None:
        room = MAX_BYTES - self.counters.bytes_received
        if not room:
            raise ProtocolError(
                f"at most {MAX_BYTES} bytes are accepted before a connection is admitted"
            )
        try:
            with self.decoder.get_buffer() as buffer:
                num_bytes = self.stream.receive_now(buffer[:room])
        finally:
            self._check_bounds()
        self._take(num_bytes)

    def _take(self, num_bytes: int) -> None:
        """Count bytes that the decoder's buffer has been given."""
        if not num_bytes:
            raise ConnectionLost("closed the connection")
        self.decoder.advance(num_bytes)
        self.counters.bytes_received += num_bytes

    def _identify(self, guard: Guard) -> Conversation[Peer | None]:
        """Return the peer that it proves to be; None on a server without tokens."""
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
        """Send the reason of the refusal; from now on received bytes are discarded.

        Who has said nothing to a server with TLS gets none: a client that waits for TLS would take
        plain text for another server's.
        """
        self.is_dismissed, self.deadline = True, time.monotonic() + FAREWELL_S
        if self._knows_how_to_answer:
            with contextlib.suppress(OSError, SflError):
                self.send_message_as_json(message_type, content=one_line(reason))
        self.stream.shut_sending()

    def has_closed(self) -> bool:
        """Discard the bytes of a dismissed connection; return whether the peer has closed it."""
        try:
            return not self.stream.sock.recv(RAW_BYTES)
        except BlockingIOError:
            return False
