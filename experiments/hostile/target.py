"""A server that is attacked: how it is reached, and what it says."""

import contextlib
import socket
import ssl
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.errors import ConfigError, SflError
from sfl.files.checksum import crc32
from sfl.transport.addresses import is_loopback, parse_url
from sfl.transport.connection import Connection
from sfl.transport.stream import Stream, TlsStream
from sfl.transport.tokens import Tokens, read_tokens
from sfl.transport.websocket import opened
from sfl.wire.framing import encode_head, pack_head
from sfl.wire.link import is_last
from sfl.wire.messages import Limits, Message, MessageType

ANSWER_S = 60.0  # longer than a server waits for who does not come to the point
HELLO = {"role": "client", "client_id": 0, "nonce": "0" * 64}


@dataclass
class Target:
    """A server of this machine."""

    host: str
    port: int
    tls: bool = False
    websocket: bool = False  # whether SFL's messages reach it over WebSocket
    tokens: Tokens | None = None  # of the attacker: it is one client, and no other

    @contextlib.contextmanager
    def plain(self, timeout_s: float = ANSWER_S) -> Iterator[socket.socket]:
        """Connect, in the clear whatever the server speaks."""
        with socket.create_connection((self.host, self.port), timeout=timeout_s) as sock:
            yield sock

    @contextlib.contextmanager
    def connect(self) -> Iterator[Stream]:
        """Connect, under TLS if the server wants it; the attacker trusts any certificate."""
        with self.plain() as sock:
            yield secured(sock, careless_tls()) if self.tls else Stream(sock)

    @contextlib.contextmanager
    def reach(self) -> Iterator[Stream]:
        """Connect as the server wants it, over WebSocket too."""
        with self.connect() as stream:
            yield over_websocket(stream) if self.websocket else stream

    def ask(self, *sent: bytes) -> str:
        """Send bytes and return what the server says and does."""
        with self.reach() as stream:
            return converse(stream, *sent)


def target_of(address: str, token_file: str = "", *, tls: bool | None = None) -> Target:
    """Return a server of this machine as a target, after finding out whether it speaks TLS.

    Raises:
        ConfigError: it is a server of another machine.
    """
    to = parse_url(address)
    if not is_loopback(to.host):
        raise ConfigError(f"--server {address}: is not on this machine; nothing else is attacked")
    tokens = read_tokens(Path(token_file)) if token_file else None
    target = Target(to.host, to.port, websocket=to.transport in ("ws", "wss"), tokens=tokens)
    if tls is None:
        with target.plain() as sock:
            try:
                secured(sock, careless_tls())
                tls = True
            except (ssl.SSLError, OSError):
                tls = False
    target.tls = tls
    return target


def secured(sock: socket.socket, context: ssl.SSLContext) -> TlsStream:
    """Begin TLS with a server, whoever it is."""
    stream = TlsStream(sock, context, host="127.0.0.1")
    stream.set_timeout(ANSWER_S)
    stream.finish_handshake()
    return stream


def over_websocket(stream: Stream) -> Stream:
    """Open a WebSocket over a connection."""
    return opened(stream, "ws://127.0.0.1/")


def careless_tls(newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """Return TLS that trusts everybody, up to a version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for versions that nobody should speak
        context.minimum_version = min(newest, ssl.TLSVersion.TLSv1_2)
        context.maximum_version = newest
        if newest < ssl.TLSVersion.TLSv1_2:
            context.set_ciphers("ALL:@SECLEVEL=0")  # else our own side would not even try
    return context


def converse(stream: Stream, *sent: bytes) -> str:
    link = link_over(stream)
    with contextlib.suppress(SflError):  # it may close before it has all
        for data in sent:
            link._transmit([memoryview(data)])
    return heard(link)


def link_over(stream: Stream, kind: type[Connection] = Connection) -> Connection:
    """Return messages over a connection."""
    link = kind(stream, timeout_s=ANSWER_S, limits=Limits())
    link.certificate = stream.certificate
    return link


def heard(link: Connection) -> str:
    """Return what a server says, to its last word or until it closes."""
    link.peer_name, said = "server", ""
    try:
        while True:
            message = link._next()
            said = f"{message.type}"
            if is_last(message):
                return f"{message.type}: {message.content}"
    except (OSError, SflError) as error:
        how = str(error).removeprefix("the server ")
        return f"{said}, then {how}" if said else how


def frame(content: object = "", kind: MessageType = MessageType.REGISTER, **more: Any) -> bytes:
    return encode_head(Message(kind, content=content, **more))


def raw(text: bytes, payload: bytes = b"") -> bytes:
    """Return a frame with any JSON."""
    return pack_head(len(text), len(payload), crc=crc32(text)) + text + payload
