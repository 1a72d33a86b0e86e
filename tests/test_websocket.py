"""WebSockets that break the rules, seen from either end."""

import base64
import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Iterable, Iterator

import pytest

pytest.importorskip("websockets")

from experiments.hostile.upgrades import BINARY, CLOSE, PING, TEXT, piece, request
from sfl.errors import AuthError, Damaged, ProtocolError, SflError
from sfl.transport.connection import Connection
from sfl.transport.stream import Stream
from sfl.transport.websocket import MOST_EMPTY, WebSocketStream, accepted, opened
from sfl.wire.messages import Limits

MOST_BYTES = 4 * 2**20  # that an endless peer gets rid of, with what the system's buffers hold
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def accepting(asked: bytes) -> bytes:
    key = asked.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    return head + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"


def opened_with(*answer: bytes, endless: bytes = b"", is_open: bool = False) -> tuple[object, int]:
    """Open a WebSocket with a server that answers so; return the first message or the error."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    num_sent = 0

    def serve() -> None:
        nonlocal num_sent
        asked = theirs.recv(2**16)
        with contextlib.suppress(OSError):
            theirs.sendall((accepting(asked) if is_open else b"") + b"".join(answer))
            while endless and num_sent < 2 * MOST_BYTES:
                num_sent += theirs.send(endless * (2**16 // len(endless)))
        theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    with theirs:
        thread.start()
        try:
            stream = opened(Stream(ours), "ws://server/")
            with Connection(stream, timeout_s=5, limits=Limits()) as link:
                found: object = link._next()
        except SflError as error:
            found = error
        ours.close()
        thread.join(10)
        assert not thread.is_alive()
    return found, num_sent


HOSTILE = {
    "a redirect": (b"HTTP/1.1 301 Moved\r\nLocation: ws://other/\r\n\r\n", b"", "HTTP 301"),
    "a page": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"", "HTTP 200"),
    "an endless page": (b"HTTP/1.1 200 OK\r\n\r\n", b"x", "expected no more than 1048576 bytes"),
    "a page of 10^17 bytes": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000000000\r\n\r\n", b"x", "body too large",
    ),
    "101 without a key": (
        b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b"",
        "Sec-WebSocket-Accept",
    ),
    "headers without end": (b"HTTP/1.1 101 X\r\n", b"A: b\r\n", "expected no more than 128"),
    "a line without end": (b"HTTP/1.1 101 X\r\n", b"A", "expected no more than 8192 bytes"),
    "no HTTP": (b"SFL\0" * 100 + b"\r\n", b"", "did not receive a valid HTTP response"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_server_that_opens_no_websocket_is_left_in_one_line(name: str) -> None:
    answer, endless, why = HOSTILE[name]
    error, num_sent = opened_with(answer, endless=endless)
    assert isinstance(error, AuthError)
    assert "ws://server/ opens no WebSocket (" in str(error)
    assert why in str(error)
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1000
    assert num_sent < MOST_BYTES


@pytest.mark.parametrize(
    ("frames", "endless"),
    [
        ([piece(size=2**63, mask=0)], b"x"),
        ([piece(b"x", mask=0, flags=0), piece(bytes(2**19), 0, mask=0, flags=0)],
         piece(bytes(2**10), 0, mask=0, flags=0)),
        ([], piece(b"", PING, mask=0)),
        ([], piece(mask=0)),
        ([piece(b"x")], b"x"),
    ],
    ids=["2^63 bytes", "fragments", "pings", "nothing", "a mask"],
)  # fmt: skip
def test_a_server_that_sends_odd_frames_without_end_is_left(
    frames: list[bytes], endless: bytes
) -> None:
    error, num_sent = opened_with(*frames, endless=endless, is_open=True)
    assert isinstance(error, SflError)
    assert num_sent < MOST_BYTES


@pytest.fixture
def ends() -> Iterator[tuple[WebSocketStream, socket.socket]]:
    """A server's end of a WebSocket, and its client's socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        stream = accepted(Stream(ours), b"G")
        theirs.sendall(request()[1:])
        assert stream.do_handshake_now()
        assert b" 101 " in theirs.recv(2**16)
        yield stream, theirs


def received(stream: WebSocketStream) -> bytes:
    buffer, found = memoryview(bytearray(100)), b""
    with contextlib.suppress(BlockingIOError):
        while count := stream.receive_now(buffer):
            found += buffer[:count]
    return found


def test_pings_between_messages_are_answered_and_pass(
    ends: tuple[WebSocketStream, socket.socket],
) -> None:
    """As many as one likes, if messages come between."""
    stream, client = ends
    for k in range(3):
        client.sendall(piece(b"p", PING) * MOST_EMPTY + piece(bytes([k])))
        assert received(stream) == bytes([k])
        stream.send_now([memoryview(b"answer")])
        assert client.recv(2**16) == piece(b"p", PING + 1, mask=0) * MOST_EMPTY + piece(
            b"answer", mask=0
        )


def test_frames_that_carry_nothing_do_not_keep_the_reading_thread(
    ends: tuple[WebSocketStream, socket.socket],
) -> None:
    stream, client = ends
    client.sendall(piece() * (MOST_EMPTY + 1))
    with pytest.raises(ProtocolError, match="pings or empty messages without end"):
        received(stream)


CLOSING = piece(b"\x03\xe8", CLOSE)
BEHIND = [piece(b"junk"), piece(), piece(b"p", PING), piece(b"t", TEXT), piece(mask=0), CLOSING]


@pytest.mark.parametrize(
    "asked", [request(), request(key=""), request(version=8), b"GET /\r\n\r\n"]
)
def test_what_comes_before_the_answer_is_refused(asked: bytes) -> None:
    """At once with the request, whatever it is; how the server then ends never fails."""
    for behind in itertools.chain(BEHIND, itertools.permutations(BEHIND, 2)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            stream = accepted(Stream(ours), b"G")
            theirs.sendall(asked[1:] + b"".join([behind] if isinstance(behind, bytes) else behind))
            with pytest.raises((ProtocolError, Damaged, OSError)):
                stream.do_handshake_now()
            with contextlib.suppress(OSError):
                stream.send_now([memoryview(b"why")])
            stream.shut_sending()
            assert b" 101 " not in theirs.recv(2**16)


def flips(data: bytes) -> Iterable[bytes]:
    for k in range(8 * len(data)):
        changed = bytearray(data)
        changed[k // 8] ^= 1 << k % 8
        yield bytes(changed)


@pytest.mark.parametrize("size", [1, 125, 126, 70_000])
def test_a_bit_that_flips_in_a_frames_head_is_damage_on_the_way(size: int) -> None:
    """Never the peer's fault: it comes again."""
    whole = piece(bytes(size), BINARY)
    num_damaged = 0
    for head in flips(whole[: len(whole) - size]):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            stream = accepted(Stream(ours), b"G")
            theirs.sendall(request()[1:])
            assert stream.do_handshake_now()
            theirs.sendall(head + bytes(size))
            try:
                received(stream)
            except Damaged:
                num_damaged += 1
                stream.shut_sending()
                assert b"\x88" in theirs.recv(2**16)  # a close frame, with the reason
    assert num_damaged >= 7  # others make a pong of it, or a part of a longer message
