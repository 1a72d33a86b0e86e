"""A WebSocket (RFC 6455) as a stream of bytes, over TCP or TLS.

SFL's own frames travel unchanged in binary messages; where one message ends and the next begins
means nothing. The library ``websockets`` computes what is sent and what was received, without
threads or sockets of its own::

    stream below -> raw bytes -> Protocol -> messages' bytes received
    stream below <- unsent <- Protocol <- bytes to send
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from sfl.errors import AuthError, ConnectionLost, Damaged, ProtocolError
from sfl.transport.http_proxy import NOT_YET
from sfl.transport.stream import MAX_UNASKED_BYTES, RAW_BYTES, Stream
from sfl.wire.link import one_line

MOST_IN_MESSAGE = 2**20  # bytes; who has more to say begins another message
MOST_EMPTY = 1000  # frames in a row that carry nothing, such as pings
_SILENT = logging.Logger("sfl.transport.websocket", logging.CRITICAL + 1)


class WebSocketStream(Stream):
    """One side of a WebSocket over another stream."""

    def __init__(self, below: Stream, protocol: Protocol) -> None:
        super().__init__(below.sock)
        self._below, self._protocol = below, protocol
        self._lock = threading.Lock()  # of the protocol: one thread may receive, another send
        self._raw = memoryview(bytearray(RAW_BYTES))
        self._received = memoryview(b"")
        self._due: list[bytes] = []  # what the protocol wants to send
        self._unsent = memoryview(b"")
        self._num_empty = 0  # frames in a row that carry nothing
        self.certificate = below.certificate

    @property
    def is_ready(self) -> bool:  # type: ignore[override]
        return self._protocol.state is not State.CONNECTING

    @property
    def raw_bytes_received(self) -> int:  # type: ignore[override]
        return self._below.raw_bytes_received

    @property
    def has_unsent(self) -> bool:  # type: ignore[override]
        return bool(self._unsent) or self._below.has_unsent

    def receive_into(self, buffer: memoryview) -> int:
        return self._receive(buffer, self._below.receive_into)

    def receive_now(self, buffer: memoryview) -> int:
        return self._receive(buffer, self._below.receive_now)

    def _receive(self, buffer: memoryview, receive: Callable[[memoryview], int]) -> int:
        while not self._received and not self._is_over:
            self._feed(receive(self._raw))
        taken = min(len(buffer), len(self._received))
        buffer[:taken], self._received = self._received[:taken], self._received[taken:]
        return taken

    @property
    def _is_over(self) -> bool:
        """Whether the peer sends no more."""
        return self._protocol.close_rcvd is not None or self._protocol.state is State.CLOSED

    def _feed(self, num_raw: int) -> None:
        """Take raw bytes of the stream below; 0: it has ended.

        Raises:
            ProtocolError: they open no WebSocket, or hold text, or nothing again and again.
            Damaged: a frame is none, or is longer than a message may be.
        """
        protocol = self._protocol
        with self._lock:
            if num_raw:
                protocol.receive_data(bytes(self._raw[:num_raw]))
            else:
                protocol.receive_eof()
            events = protocol.events_received()
            if events and isinstance(protocol, ServerProtocol) and isinstance(events[0], Request):
                if events[1:] or protocol.close_rcvd is not None or protocol.parser_exc:
                    raise ProtocolError("a WebSocket's frames before it was opened")
                protocol.send_response(protocol.accept(events[0]))
            self._due += protocol.data_to_send()
        frames = [event for event in events if isinstance(event, Frame)]
        kinds = (Opcode.BINARY, Opcode.CONT)
        self._received = memoryview(b"".join(f.data for f in frames if f.opcode in kinds))
        self._check(frames, has_ended=not num_raw)

    def _check(self, frames: Sequence[Frame], *, has_ended: bool) -> None:
        """Raise what is wrong with the frames just received; who has gone did no wrong."""
        self._num_empty = 0 if self._received else self._num_empty + len(frames)
        if any(frame.opcode is Opcode.TEXT for frame in frames):
            raise ProtocolError("a WebSocket's text; SFL sends binary messages")
        if self._num_empty > MOST_EMPTY or sum(map(len, self._due)) > MAX_UNASKED_BYTES:
            raise ProtocolError("a WebSocket's pings or empty messages without end")
        refusal, broken = self._protocol.handshake_exc, self._protocol.parser_exc
        if refusal and (not has_ended or isinstance(refusal, InvalidStatus)):
            raise ProtocolError(f"no WebSocket: {_told(refusal)}")
        if broken and not has_ended:  # by the peer, or on the way: nothing tells which
            raise Damaged(f"a WebSocket's frame arrived damaged: {_told(broken)}")

    def send(self, parts: Sequence[memoryview]) -> int:
        taken = self._wrap(parts)
        self._pass_on(self._below.send)
        return taken

    def send_now(self, parts: Sequence[memoryview]) -> int:
        taken = self._wrap(parts)
        try:
            self._pass_on(self._below.send_now)
        except BlockingIOError:
            if not taken:
                raise
        return taken

    def _wrap(self, parts: Sequence[memoryview]) -> int:
        """Make a message of some bytes if all earlier ones are sent; return of how many."""
        if self.has_unsent:
            return 0
        plain = b"".join(part[:RAW_BYTES] for part in parts)[:RAW_BYTES]
        with self._lock:
            if plain and self._protocol.state is not State.OPEN:
                raise BrokenPipeError(errno.EPIPE, "the WebSocket is closed")
            if plain:
                self._protocol.send_binary(plain)
            self._due += self._protocol.data_to_send()
            self._unsent, self._due = memoryview(b"".join(self._due)), []
        return len(plain)

    def _pass_on(self, send: Callable[[Sequence[memoryview]], int]) -> None:
        self._unsent = self._unsent[send([self._unsent] if self._unsent else []) :]

    def do_handshake_now(self) -> bool:
        """Continue the server's part of the opening without waiting; return whether it is done.

        Raises:
            BlockingIOError: no bytes have arrived, or the peer reads none.
            ProtocolError: it is no request for a WebSocket; the answer says so.
            OSError: the connection has ended.
        """
        try:
            self._feed_opening(self._below.receive_now(self._raw))
        finally:
            self.send_now([])
        return self.is_ready

    def finish_handshake(self) -> None:
        """Run a client's part of the opening to its end.

        Raises:
            TimeoutError, OSError: as in ``receive_into``.
            ProtocolError: the server opens no WebSocket.
        """
        assert isinstance(self._protocol, ClientProtocol)
        self._protocol.send_request(self._protocol.connect())
        self._due += self._protocol.data_to_send()
        while not self.is_ready:
            self.send([])
            while self.has_unsent:
                self.send([])
            self._feed_opening(self._below.receive_into(self._raw))

    def _feed_opening(self, num_raw: int) -> None:
        self._feed(num_raw)
        if not num_raw:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def shut_sending(self) -> None:
        with contextlib.suppress(OSError):
            with self._lock:
                is_open = self._protocol.state is State.OPEN and not self._is_over
                if is_open and not self.has_unsent:
                    self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            self.send_now([])  # else why it has been closed already
        self._below.shut_sending()

    def close(self) -> None:
        self._below.close()


def accepted(below: Stream, first: bytes) -> WebSocketStream:
    """Return the server's side of a WebSocket whose request begins with these bytes.

    A page of a browser is refused: it would act for whoever looks at it.
    """
    protocol = ServerProtocol(origins=[None], max_size=MOST_IN_MESSAGE, logger=_SILENT)
    protocol.receive_data(first)
    return WebSocketStream(below, protocol)


def opened(below: Stream, url: str) -> WebSocketStream:
    """Open a WebSocket with a server, and return the client's side.

    Raises:
        ConnectionRefusedError: a proxy says that there is no server behind it now.
        AuthError: the server opens no WebSocket.
        ConnectionLost: what follows its answer is damaged.
        TimeoutError, OSError: the connection has ended.
    """
    protocol = ClientProtocol(parse_uri(url), max_size=MOST_IN_MESSAGE, logger=_SILENT)
    stream = WebSocketStream(below, protocol)
    try:
        stream.finish_handshake()
    except ProtocolError as error:
        stream.close()
        why = protocol.handshake_exc
        if isinstance(why, InvalidStatus) and why.response.status_code in NOT_YET:
            raise ConnectionRefusedError(errno.ECONNREFUSED, _told(why)) from error
        raise AuthError(
            f"{url} opens no WebSocket ({error}): start the server with --transport ws, or give"
            " --server HOST:PORT"
        ) from error
    except Damaged as error:
        stream.close()
        raise ConnectionLost(str(error)) from error
    return stream


def _told(error: Exception) -> str:
    """Return the library's error in one line, with its cause."""
    return one_line(": ".join(filter(None, (str(error), str(error.__cause__ or "")))))
