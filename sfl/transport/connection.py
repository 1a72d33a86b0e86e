"""A TCP connection that sends and receives messages.

Every blocking call has a deadline, counted from the last byte that moved: a large file on a slow
link passes, and a silent peer is noticed. A busy peer sends heartbeats
(``sfl.transport.heartbeat``), which are neither returned nor counted.
"""

import contextlib
import errno
import math
import select
import socket
import ssl
import threading
import time

from sfl.errors import (
    AuthError,
    ConnectionLost,
    Damaged,
    HasClosed,
    PeerFailed,
    ProtocolError,
    SflError,
)
from sfl.transport.addresses import address_of
from sfl.transport.polling import poll
from sfl.transport.stream import Stream, is_refusal, tls_reason
from sfl.wire.framing import Decoder, encode_head
from sfl.wire.link import is_last, one_line
from sfl.wire.members import Channel
from sfl.wire.messages import Limits, Message, MessageType

Socket = socket.socket
FAREWELL_S = 2.0  # how long a closing side waits for the peer to read its last message
SLOWEST_BYTES_PER_S = 1024.0  # a peer must read a message this fast after its deadline


class Connection(Channel):
    """One TCP connection, message by message."""

    def __init__(
        self,
        stream: Stream | socket.socket,
        *,
        timeout_s: float,
        limits: Limits,
        decoder: Decoder | None = None,
    ) -> None:
        """``decoder`` may hold bytes read from the stream; ``limits`` apply from now on."""
        super().__init__()
        self._stream = stream if isinstance(stream, Stream) else Stream(stream)
        if self._stream.sock.family != socket.AF_UNIX:
            self._stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(self._stream.sock, timeout_s)
        self._stream.set_timeout(timeout_s)
        self.timeout_s = timeout_s
        self.certificate = self._stream.certificate
        self.heartbeat_s = math.inf  # interval that the peer asks for; inf until it does
        self.heard_at = self.spoke_at = time.monotonic()  # when bytes last moved
        self._sending = threading.Lock()  # messages do not interleave
        self._is_broken = False  # whether a heartbeat could not be sent
        self._decoder = decoder or Decoder(limits)
        self.limits = limits

    @property
    def limits(self) -> Limits:
        """What we accept from the peer; replace it only between messages."""
        return self._decoder.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._decoder.limits = limits

    def _send(self, message: Message) -> int:
        started = time.perf_counter()
        parts = [memoryview(encode_head(message)), memoryview(message.payload)]
        num_bytes = sum(map(len, parts))
        self.counters.bytes_sent += num_bytes
        with self._sending:
            self._transmit(parts)
        self.counters.messages_sent += 1
        self.counters.sending_s += time.perf_counter() - started
        return num_bytes

    def send_heartbeat(self, silent_s: float) -> None:
        if time.monotonic() - self.spoke_at < silent_s or not self._sending.acquire(blocking=False):
            return
        try:
            message = Message(MessageType.HEARTBEAT, self.name, self.peer_name, "", self.at)
            moved = self.bytes_moved
            self._transmit([memoryview(encode_head(message))])
            self.bytes_moved = moved
        except ConnectionLost:  # the receiving thread reports it
            self._is_broken = True
        finally:
            self._sending.release()

    def _transmit(self, parts: list[memoryview], *, wait: bool = True) -> None:
        """Send ``parts``, removing what is sent; without ``wait``, stop when it would block."""
        give_up_at = time.monotonic() + self.timeout_s
        try:
            while any(map(len, parts)) or self._stream.has_unsent:
                num_sent = (self._stream.send if wait else self._stream.send_now)(parts)
                self.spoke_at = time.monotonic()
                self.bytes_moved += num_sent
                give_up_at += num_sent / SLOWEST_BYTES_PER_S
                if self.spoke_at > give_up_at:
                    raise ConnectionLost(f"{self.peer_title} takes what it is sent too slowly")
                while parts and num_sent >= len(parts[0]):
                    num_sent -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][num_sent:]
        except BlockingIOError:
            return
        except TimeoutError as error:
            raise ConnectionLost(
                f"{self.peer_title} took nothing for {self.timeout_s:g} seconds"
            ) from error
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError, where: str = "") -> SflError:
        """Return our error for a connection that broke, or that the peer's TLS refused."""
        if isinstance(error, ssl.SSLError) and is_refusal(error):
            return AuthError(f"{self.peer_title} refused us: {tls_reason(error)}; see --tls-cert")
        return ConnectionLost(f"{self.peer_title} {how_it_ended(error)}{where}")

    def _next(self) -> Message:
        """Read from the socket until one message is complete, and return it."""
        started = time.perf_counter()
        first_byte = started if self._decoder.inside else None
        while (message := self._decoded()) is None or message.type is MessageType.HEARTBEAT:
            if message is not None:
                first_byte = None
                continue
            self._read()
            if first_byte is None:
                first_byte = time.perf_counter()
        now = time.perf_counter()
        self.counters.messages_received += 1
        self.counters.waiting_s += (first_byte or now) - started
        self.counters.receiving_s += now - (first_byte or now)
        return message

    def _decoded(self) -> Message | None:
        """Return the next message of the bytes read so far, or None; heartbeats are not counted."""
        try:
            message = self._decoder.next_message()
        except (ProtocolError, Damaged) as error:
            error.args = (f"from {self.peer_title}: {error}",)
            raise
        if message is not None and message.type is MessageType.HEARTBEAT:
            self.counters.bytes_received -= message.head_bytes
            self.bytes_moved -= message.head_bytes
            self.peer_at = message.at
        return message

    @property
    def _where(self) -> str:
        inside = self._decoder.inside
        return f" in the middle of a message's {inside}" if inside else ""

    def _silent(self) -> ConnectionLost:
        """Return the error for a peer that sent nothing until the deadline."""
        silent = f"sent nothing for {self.timeout_s:g} seconds"
        return ConnectionLost(f"{self.peer_title} {silent}{self._where}")

    def _read(self, *, wait: bool = True) -> None:
        """Read some bytes; without ``wait``, raise ``BlockingIOError`` if there are none."""
        with self._decoder.get_buffer() as buffer:
            try:
                num_bytes = self._receive(buffer) if wait else self._stream.receive_now(buffer)
            except BlockingIOError:
                raise
            except TimeoutError as error:
                raise self._silent() from error
            except OSError as error:
                raise self._broken(error, self._where) from error
        if num_bytes == 0:
            kind = ConnectionLost if self._decoder.inside else HasClosed
            raise kind(f"{self.peer_title} closed the connection{self._where}")
        self._decoder.advance(num_bytes)
        self.heard_at = time.monotonic()
        self.counters.bytes_received += num_bytes
        self.bytes_moved += num_bytes

    def _receive(self, buffer: memoryview) -> int:
        num_bytes = poll(lambda: self._stream.receive_now(buffer))
        return self._stream.receive_into(buffer) if num_bytes is None else num_bytes

    @property
    def address(self) -> str:
        return address_of(self._stream.sock)

    def is_cut_off(self) -> bool:
        if not hasattr(select, "POLLRDHUP"):  # not Linux: the next heartbeat but one fails
            return self._is_broken
        poller = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, by us
            poller.register(self._stream.sock, select.POLLRDHUP)
            return bool(poller.poll(0))
        return False

    def cut_off(self) -> None:
        self._stream.cut_off()

    @property
    def is_closed(self) -> bool:
        """Whether this side has closed the connection."""
        return self._stream.sock.fileno() < 0

    def last_words(self) -> PeerFailed | None:
        with contextlib.suppress(OSError, SflError):
            self._stream.set_timeout(FAREWELL_S)
            while True:
                message = self._next()
                if is_last(message):
                    return self.peer_failed(message)
        return None

    def end_sending(self, message_type: MessageType, reason: str) -> None:
        """Send a last message and shut down sending; ignore a peer that has disconnected."""
        with contextlib.suppress(ConnectionLost, OSError):
            self._stream.set_timeout(FAREWELL_S)
            self.send_message_as_json(message_type, content=one_line(reason))
        self._stream.shut_sending()

    def dismiss(self, message_type: MessageType, reason: str) -> None:
        self.end_sending(message_type, reason)
        self.close_gracefully()

    def close_gracefully(self) -> None:
        # Closing with unread bytes would reset the connection and lose our last message. So read
        # and discard them until the peer closes or the deadline passes.
        self._stream.shut_sending()
        with contextlib.suppress(OSError):
            self._stream.set_timeout(FAREWELL_S)
        deadline, unread = time.monotonic() + FAREWELL_S, memoryview(bytearray(65536))
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and self._stream.receive_into(unread):
                pass
        self.close()

    def close(self) -> None:
        self._stream.close()


def how_it_ended(error: OSError) -> str:
    """Return in words how a connection ended."""
    if isinstance(error, ssl.SSLEOFError):
        return "closed the connection"
    if isinstance(error, ssl.SSLError):
        return f"sent invalid TLS data: {tls_reason(error)}"
    closed = (errno.ECONNRESET, errno.EPIPE, errno.EBADF, errno.ENOTCONN, errno.ECONNABORTED)
    return (
        "closed the connection" if error.errno in closed else f"is out of reach: {error.strerror}"
    )


def _keep_alive(sock: socket.socket, timeout_s: float) -> None:
    """Enable TCP keepalive, and a limit for unacknowledged bytes.

    Keepalive probes an idle connection after 30 seconds. Linux does not probe while bytes are
    unacknowledged, and would retransmit them for 15 minutes.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    for option, value in (*seconds.items(), ("TCP_USER_TIMEOUT", round(timeout_s * 1000))):
        if hasattr(socket, option):  # macOS lacks some
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
