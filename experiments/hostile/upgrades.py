"""What whoever reaches a server's port, or is a client of its run, may do over WebSocket.

Requests and frames are made here by hand: no library would send them. A server that does not speak
WebSocket takes them for any other bytes.
"""

import contextlib
import ssl
import struct
from collections.abc import Callable, Iterable, Mapping

from experiments.hostile.insiders import Insider
from experiments.hostile.target import Target, frame, link_over, over_websocket
from sfl.errors import SflError
from sfl.transport.stream import Stream
from sfl.wire.framing import Decoder
from sfl.wire.messages import Limits

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes of RFC 6455, section 5.2
FIN, COMPRESSED, MASKED = 0x80, 0x40, 0x80
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of the example in section 1.3
FOR_EVER = 2**24  # bytes; more than any bound
SLOWLY_S = 5.0


def request(
    *more: str, method: str = "GET", http: str = "HTTP/1.1", version: int = 13, key: str = KEY
) -> bytes:
    """Return a request for a WebSocket, with more headers."""
    lines = [f"{method} / {http}", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Version: {version}", *more]
    lines += [f"Sec-WebSocket-Key: {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode()


def piece(
    data: bytes = b"", opcode: int = BINARY, *, flags: int = FIN, mask: int = MASKED, size: int = -1
) -> bytes:
    """Return a WebSocket's frame, masked by zeros; ``size``: the one that it declares."""
    size = len(data) if size < 0 else size
    short = size if size < 126 else 126 if size < 2**16 else 127
    long = {126: struct.pack("!H", size % 2**16), 127: struct.pack("!Q", size)}.get(short, b"")
    return bytes([flags | opcode, mask | short]) + long + bytes(4 if mask else 0) + data


def repeated(data: bytes) -> list[bytes]:
    """Return the same bytes again and again, joined to larger ones."""
    block = data * max(2**16 // len(data), 1)
    return [block] * (FOR_EVER // len(block))


_CLOSE = piece(struct.pack("!H", 1000), CLOSE)
FRAMES: dict[str, Iterable[bytes]] = {
    "a WebSocket's frame of 2^63 bytes": [piece(size=2**63)],
    "a WebSocket's frame of 1 GB": [piece(size=10**9)],
    "fragments for ever": repeated(piece(bytes(1000), CONT, flags=0)),
    "empty fragments for ever": repeated(piece(b"", CONT, flags=0)),
    "a compressed message": [piece(bytes(100), flags=FIN | COMPRESSED)],
    "a frame without a mask": [piece(frame(), mask=0)],
    "an unknown opcode": [piece(opcode=7)],
    "a long ping": [piece(bytes(126), PING)],
    "pings for ever": repeated(piece(bytes(100), PING)),
    "pongs for ever": repeated(piece(b"", PONG)),
    "empty messages for ever": repeated(piece()),
    "closes for ever": repeated(_CLOSE),
    "a close of no code": [piece(b"\0", CLOSE)],
    "text": [piece(frame(), TEXT)],
    "a continuation of nothing": [piece(frame(), CONT)],
}
FRAGMENTED = {"fragments for ever", "empty fragments for ever"}
REQUESTS: dict[str, Iterable[bytes]] = {
    "an upgrade, junk and a close at once": [request() + piece(b"junk") + _CLOSE],
    "an upgrade, a message and a close at once": [request() + piece(frame()) + _CLOSE],
    "half an upgrade and a close at once": [request(key="") + _CLOSE],
    "an upgrade to WebSocket 8": [request(version=8)],
    "an upgrade without a key": [request(key="")],
    "an upgrade with a key of one byte": [request(key="eA==")],
    "an upgrade by HTTP/1.0": [request(http="HTTP/1.0")],
    "an upgrade by HTTP/3.0": [request(http="HTTP/3.0")],
    "an upgrade by POST": [request(method="POST")],
    "an upgrade by GETS": [request(method="GETS")],
    "a browser's Origin": [request("Origin: https://example.org")],
    "an upgrade with a body": [request("Content-Length: 1000000"), bytes(10**6)],
    "an upgrade in chunks": [request("Transfer-Encoding: chunked")],
    "a header of 1 MB": [request("X: " + "x" * 10**6)],
    "10,000 headers": [request(*(["X: x"] * 10_000))],
    "a header of no name": [request(": x")],
    "a line that does not end": [b"GET /", *repeated(b"x")],
    "an offer to compress": [
        request("Sec-WebSocket-Extensions: permessage-deflate"),
        piece(frame()),
    ],
}


def first_part(name: str, frames: Iterable[bytes]) -> Iterable[bytes]:
    """Return frames behind the beginning of a message, if they go on with one."""
    return [piece(b"x", flags=0), *frames] if name in FRAGMENTED else frames


def sent(stream: Stream, parts: Iterable[bytes]) -> None:
    """Send bytes until the server takes no more."""
    link = link_over(stream)
    with contextlib.suppress(SflError):
        for part in parts:
            link._transmit([memoryview(part)])


def heard_from(stream: Stream) -> bytes:
    """Return what a server sends until it closes.

    Raises:
        TimeoutError: it has not closed.
    """
    data, buffer = bytearray(), memoryview(bytearray(2**16))
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while count := stream.receive_into(buffer):
            data += buffer[:count]
    return bytes(data)


def told(data: bytes) -> str:
    """Return a server's answer in words: its status, or the frames behind it."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].decode(errors="replace")
    if not status.startswith("HTTP/"):
        return said_by_sfl(data)
    if b"extensions" in head.lower():
        return "accepts an extension"
    return of_frames(rest) if " 101 " in status else status


def of_frames(data: bytes) -> str:
    """Return a server's frames in words: what SFL says in them, pongs and how it closes."""
    inside, words = b"", []
    while len(data) >= 2:
        opcode, size, start = data[0] % 16, data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4]), 4
        content, data = data[start : start + size], data[start + size :]
        if opcode == BINARY:
            inside += content
        if opcode == CLOSE:
            words.append(f"closed: {int.from_bytes(content[:2])} {content[2:].decode()}".strip())
    return ", then ".join(([said_by_sfl(inside)] if inside else []) + words) or said_by_sfl(b"")


def said_by_sfl(data: bytes) -> str:
    """Return the last message in a server's bytes."""
    decoder, said = Decoder(Limits()), "closed the connection"
    try:
        for message in decoder.messages_of(data):
            said = f"{message.type}: {message.content}"
    except SflError as error:
        return str(error)
    return said


def _sending(parts: Iterable[bytes], *, after: bytes = b"") -> Callable[[Target], str]:
    """Send parts, ``after`` another one that is answered; return what the server says."""

    def attempt(target: Target) -> str:
        with target.connect() as stream:
            answer = b""
            if after:
                sent(stream, [after])
                answer = _first(stream)
            sent(stream, parts)
            return told(answer + heard_from(stream))

    return attempt


def _first(stream: Stream) -> bytes:
    buffer = memoryview(bytearray(2**16))
    return bytes(buffer[: stream.receive_into(buffer)])


def upgrade_attacks() -> dict[str, Callable[[Target], str]]:
    """Return what strangers do over WebSocket that is answered at once."""
    return {name: _sending(parts) for name, parts in REQUESTS.items()} | {
        name: _sending(first_part(name, parts), after=request()) for name, parts in FRAMES.items()
    }


def slowly(target: Target) -> str:
    """Ask for a WebSocket, a byte every five seconds."""
    with target.connect() as stream:
        stream.set_timeout(SLOWLY_S)
        for byte in request():
            sent(stream, [bytes([byte])])
            with contextlib.suppress(TimeoutError):
                return told(heard_from(stream))
    return "took it all"


SLOW_UPGRADES: Mapping[str, Callable[[Target], str]] = {
    "half an upgrade, and silence": _sending([request()[:50]]),
    "an upgrade, a byte every 5 seconds": slowly,
    "half a WebSocket's frame, and silence": _sending([piece(frame())[:50]], after=request()),
    "a WebSocket, and silence": _sending([], after=request()),
}


def try_frames(target: Target, name: str) -> str:
    """Join a run as its client over WebSocket, send frames, and return what the server says."""
    with target.connect() as stream:
        insider = Insider(over_websocket(stream))
        insider.begin()
        sent(stream, first_part(name, FRAMES[name]))
        return of_frames(heard_from(stream))
