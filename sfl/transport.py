"""Messages over TCP: a connection with four calls, listening, connecting.

The four calls are all that a conversation sees of a wire::

    send_message_as_json(type, sender, receiver, content)    ->  receive_message_as_json(type)
    send_file(type, data, sender, receiver, content)         ->  receive_file(type)

Every blocking call has a deadline. It counts from the last byte that moved, so that a large file
on a slow link passes and a silent peer is noticed.
"""

import contextlib
import errno
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sfl.errors import ConfigError, ConnectionLost, PeerFailed, ProtocolError, RunError
from sfl.protocol import Decoder, Limits, Message, MessageType, Position, encode_head

FAREWELL_S = 2.0  # how long a closing side waits for the other to read its last words
_MAX_BACKOFF_S = 5.0
_NOWHERE = Position()
# What ends a conversation, and how to say so.
LAST_WORDS = {MessageType.ABORT: "stopped", MessageType.INVALID_MESSAGE: "refused"}


@dataclass(slots=True)
class Counters:
    """What passed over a connection so far; seconds by what this side was doing.

    ``waiting_s`` ends with the first byte of a message, ``receiving_s`` with its last.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    sending_s: float = 0.0
    waiting_s: float = 0.0
    receiving_s: float = 0.0

    def copy(self) -> "Counters":
        return replace(self)


class Link(Protocol):
    """What a conversation needs of a connection; sockets and the simulation provide it."""

    counters: Counters
    peer_name: str

    def send_message_as_json(
        self, message_type: MessageType, sender: str = "", receiver: str = "", content: Any = "",
        *, at: Position = _NOWHERE,
    ) -> None: ...  # fmt: skip

    def send_file(
        self, message_type: MessageType, data: bytes, sender: str = "", receiver: str = "",
        content: Any = "", *, at: Position = _NOWHERE,
    ) -> None: ...  # fmt: skip

    def receive_message_as_json(
        self, *expected: MessageType, at: Position | None = None
    ) -> Message: ...

    def receive_file(self, *expected: MessageType, at: Position | None = None) -> Message: ...


class MessageLink(ABC):
    """The four calls on top of two hooks: ``_send(message)`` and ``_next()``."""

    def __init__(self, name: str = "", peer_name: str = "") -> None:
        self.counters = Counters()
        self.name = name  # what we call ourselves, and the peer, in messages and errors
        self.peer_name = peer_name
        self.on_notice: Callable[[str], None] | None = None

    @property
    def _peer(self) -> str:
        return {"": "the peer", "server": "the server"}.get(self.peer_name, self.peer_name)

    @abstractmethod
    def _send(self, message: Message) -> None:
        """Send one message."""

    @abstractmethod
    def _next(self) -> Message:
        """Return the next message, waiting for it."""

    def send_message_as_json(
        self, message_type: MessageType, sender: str = "", receiver: str = "", content: Any = "",
        *, at: Position = _NOWHERE,
    ) -> None:  # fmt: skip
        """Send one message; ``content`` is any JSON value.

        Raises:
            ConnectionLost: the peer is gone, or takes nothing for the length of the deadline.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._send(Message(message_type, sender, receiver, content, at))

    def send_file(
        self, message_type: MessageType, data: bytes, sender: str = "", receiver: str = "",
        content: Any = "", *, at: Position = _NOWHERE,
    ) -> None:  # fmt: skip
        """Send one message with the bytes of a ``torch.save`` file straight behind it.

        Raises:
            ConnectionLost: as ``send_message_as_json``.
        """
        sender, receiver = sender or self.name, receiver or self.peer_name
        self._send(Message(message_type, sender, receiver, content, at, data))

    def receive_message_as_json(
        self, *expected: MessageType, at: Position | None = None
    ) -> Message:
        """Return the next message, one of the types ``expected`` and, if given, of position ``at``.

        Notices (``MESSAGE``) that come before it go to ``on_notice``.

        Raises:
            ProtocolError: something else came, or bytes that are no message.
            IntegrityError: its file was damaged on the way.
            PeerFailed: the peer refused us or ended the run, and says why.
            ConnectionLost: the peer is gone, or silent for the length of the deadline.
        """
        while True:
            message = self._next()
            if message.type is MessageType.MESSAGE and self.on_notice is not None:
                self.on_notice(str(message.content))
            else:
                break
        wanted = " or ".join(expected)
        if message.type not in expected:
            if message.type in LAST_WORDS:
                verb = LAST_WORDS[message.type]
                raise PeerFailed(f"{self._peer} {verb}: {one_line(message.content)}")
            raise ProtocolError(f"{self._peer} sent {message.type}, expected was {wanted}")
        if at is not None and message.at != at:
            raise ProtocolError(
                f"{self._peer} sent {message.type} for {message.at}, expected was {at}"
            )
        return message

    def receive_file(self, *expected: MessageType, at: Position | None = None) -> Message:
        """As ``receive_message_as_json``, for message types that carry a file (``payload``)."""
        return self.receive_message_as_json(*expected, at=at)


def one_line(text: object, max_length: int = 500) -> str:
    """Return a peer's text fit for one line of a log: printable, bounded."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:max_length])


class Connection(MessageLink):
    """One TCP connection, message by message. Closed by ``with`` or ``close()``."""

    def __init__(self, sock: socket.socket, *, timeout_s: float, limits: Limits) -> None:
        super().__init__()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        sock.settimeout(timeout_s)
        self.timeout_s = timeout_s
        self.patient = False  # whether the peer may be silent between two messages for ever
        self._sock = sock
        self._decoder = Decoder(limits)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def limits(self) -> Limits:
        """What we accept from the peer; may be replaced while nothing is being received."""
        return self._decoder.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._decoder.limits = limits

    def _send(self, message: Message) -> None:
        started = time.perf_counter()
        parts: list[memoryview] = [memoryview(encode_head(message))]
        if message.payload:
            parts.append(memoryview(message.payload))
        try:
            while parts:
                num_sent = self._sock.sendmsg(parts)
                self.counters.bytes_sent += num_sent
                while parts and num_sent >= len(parts[0]):
                    num_sent -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][num_sent:]
        except TimeoutError as error:
            raise ConnectionLost(
                f"{self._peer} took nothing for {self.timeout_s:g} seconds"
            ) from error
        except OSError as error:
            raise ConnectionLost(f"{self._peer} closed the connection") from error
        self.counters.messages_sent += 1
        self.counters.sending_s += time.perf_counter() - started

    def _next(self) -> Message:
        """Read from the socket until one message is complete, and return it."""
        started = time.perf_counter()
        first_byte = started if self._decoder.inside else None
        while (message := self._decoder.next_message()) is None:
            with self._decoder.get_buffer() as buffer:
                num_bytes = self._receive_into(buffer)
            if first_byte is None:
                first_byte = time.perf_counter()
            self._decoder.advance(num_bytes)
            self.counters.bytes_received += num_bytes
        now = time.perf_counter()
        self.counters.messages_received += 1
        self.counters.waiting_s += (first_byte or now) - started
        self.counters.receiving_s += now - (first_byte or now)
        return message

    def _receive_into(self, buffer: memoryview) -> int:
        inside = self._decoder.inside
        where = f" in the middle of a message's {inside}" if inside else ""
        while True:
            try:
                num_bytes = self._sock.recv_into(buffer)
            except TimeoutError as error:
                if self.patient and not inside:
                    continue
                silent = f"sent nothing for {self.timeout_s:g} seconds"
                raise ConnectionLost(f"{self._peer} {silent}{where}") from error
            except OSError as error:
                raise ConnectionLost(f"{self._peer} closed the connection{where}") from error
            if num_bytes == 0:
                raise ConnectionLost(f"{self._peer} closed the connection{where}")
            return num_bytes

    @property
    def address(self) -> str:
        """The peer's address, for logs."""
        try:
            return format_address(*self._sock.getpeername()[:2])
        except (OSError, TypeError, ValueError):
            return "an unknown address"

    def last_words(self) -> str:
        """Return why the peer ended the run if its word has already arrived, or "".

        To be asked after a send failed: the peer may have said why before it closed.
        """
        with contextlib.suppress(OSError, ProtocolError, ConnectionLost):
            self._sock.settimeout(FAREWELL_S)
            while True:
                message = self._next()
                if message.type in LAST_WORDS:
                    return f"{self._peer} {LAST_WORDS[message.type]}: {one_line(message.content)}"
        return ""

    def end_sending(self, message_type: MessageType, reason: str) -> None:
        """Send a last message and end our half of the connection; a peer that is gone is fine."""
        with contextlib.suppress(ConnectionLost, OSError):
            self._sock.settimeout(FAREWELL_S)
            self.send_message_as_json(message_type, content=reason)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def dismiss(self, message_type: MessageType, reason: str) -> None:
        """Send a last message and close, leaving the peer the time to read it.

        Closing while the peer's bytes lie unread would reset the connection, and with it the
        message; so they are read and thrown away until the peer closes or time is up.
        """
        self.end_sending(message_type, reason)
        deadline = time.monotonic() + FAREWELL_S
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and self._sock.recv(65536):
                pass
        self.close()

    def close(self) -> None:
        """Close the connection; a thread that waits on it wakes with ``ConnectionLost``."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _keep_alive(sock: socket.socket) -> None:
    """Let the system notice, within about a minute, a peer whose machine or network is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS names the first one otherwise
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def format_address(host: str, port: int) -> str:
    """Return ``host:port``, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ConfigError: the text is no such address.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(
            f"{text!r} is no address: give HOST:PORT, with an IPv6 host as [HOST]:PORT"
        )
    return host, int(port)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket on ``host`` (IPv4 or IPv6; "::" takes both) and ``port``.

    The port of a run that has just ended can be taken again at once.

    Raises:
        RunError: the host is not this machine's, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        # create_server sets SO_REUSEADDR where it means "in TIME_WAIT too", not on Windows.
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        in_system = error.errno is not None and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno or 0) if in_system else error.strerror
        raise RunError(
            f"cannot listen on {format_address(host, port)}: {reason};"
            " another --port or --host may be free"
        ) from error


def connect(
    host: str,
    port: int,
    *,
    timeout_s: float,
    connect_timeout_s: float,
    limits: Limits,
    on_wait: Callable[[str], None],
) -> Connection:
    """Connect, trying again with growing pauses until ``connect_timeout_s`` has passed.

    ``on_wait`` is told once, with the reason, when the first try fails.

    Raises:
        RunError: there is no such host, or nobody answered in time.
    """
    address = format_address(host, port)
    deadline = time.monotonic() + connect_timeout_s
    pause_s = 0.1
    told = False
    while True:
        left_s = deadline - time.monotonic()
        try:
            sock = socket.create_connection((host, port), timeout=max(left_s, 0.1))
            if sock.getsockname() != sock.getpeername():
                return Connection(sock, timeout_s=timeout_s, limits=limits)
            # Nobody listens, and the system gave us that very port: we reached ourselves.
            sock.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except OSError as error:
            reason = error.strerror or str(error)
            unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
        if unknown:
            raise RunError(f"unknown host {host!r}: {reason}; see --server")
        if deadline - time.monotonic() <= pause_s:
            raise RunError(
                f"no server at {address} within {connect_timeout_s:g} seconds ({reason});"
                " see --server and --connect-timeout"
            )
        if not told:
            on_wait(f"waiting for the server at {address} ({reason})")
            told = True
        time.sleep(pause_s)  # between tries there is nothing that could wake us
        pause_s = min(pause_s * 2, _MAX_BACKOFF_S)
