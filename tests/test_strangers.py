"""Whoever connects and does not show who it is keeps nobody out."""

import contextlib
import socket
import time
from pathlib import Path

import pytest

from sfl.errors import AuthError, ConnectionLost, ProtocolError
from sfl.files.checksum import crc32
from sfl.transport.acceptor import Acceptor
from sfl.transport.connection import Connection
from sfl.transport.guard import Guard
from sfl.transport.listener import listen
from sfl.transport.pending import LET_IN_WITHIN_S, MAX_BYTES, MAX_RAW_BYTES, PendingConnection
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import Tokens
from sfl.wire.framing import HEAD, MAGIC, VERSION, pack_head
from sfl.wire.link import CLIENT, Link, Peer
from sfl.wire.messages import Limits, Message, MessageType
from tests.support.certificates import Certificates
from tests.support.handshakes import FAST, HELLO, TOKEN, frame, refusal, token_file
from tests.support.launch import Launcher, Program, wait_for


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["token"], ["tls"]])
def test_whoever_says_nothing_or_little_is_sent_away_after_ten_seconds(
    launcher: Launcher, tmp_path: Path, certificates: Certificates, options: list[str]
) -> None:
    """It may be a client whose network is silent: it is told to come again, if not in TLS."""
    own: list[object] = []
    if options == ["token"]:
        own = ["--token-file", token_file(tmp_path, TOKEN)]
    if options == ["tls"]:
        own = certificates.issue("server")
    server = launcher.server(*FAST, "--clients", 1, *own)
    wait_for(server, "listening")
    with (
        socket.create_connection(("127.0.0.1", launcher.port), timeout=30) as silent,
        socket.create_connection(("127.0.0.1", launcher.port), timeout=30) as slow,
    ):
        started = time.monotonic()
        slow.settimeout(0.5)
        hello = b"\x16\x03\x01" if options == ["tls"] else MAGIC
        with contextlib.suppress(OSError):
            for byte in hello + bytes([VERSION]) + bytes(100):
                slow.send(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    if not slow.recv(1000):
                        break
        assert LET_IN_WITHIN_S - 1 < time.monotonic() - started < LET_IN_WITHIN_S + 8
        answer = b""
        while data := silent.recv(1000):
            answer += data
    assert (MessageType.TRY_AGAIN.value.encode() in answer) == (options != ["tls"])
    assert server.process.is_alive()


def test_more_than_4_kib_before_anybody_is_known_are_refused(
    launcher: Launcher, guarded: Program
) -> None:
    large = pack_head(MAX_BYTES, 0)
    assert "at most 4068 are accepted here" in refusal(launcher.port, large)
    file = pack_head(20, 1)
    assert "at most 0 are accepted here" in refusal(launcher.port, file)


def test_what_is_small_adds_up(launcher: Launcher, tmp_path: Path) -> None:
    """Whoever goes on and on before it has shown who it is: 4 KiB, however they are sent."""
    server = launcher.server(*FAST, "--token-file", token_file(tmp_path, TOKEN))
    wait_for(server, "listening")
    with socket.create_connection(("127.0.0.1", launcher.port), timeout=20) as sock:
        text = b" " * (MAX_BYTES - HEAD.size)
        sock.sendall(pack_head(len(text), 0, crc=crc32(text)) + text[1:])
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(20)
        sock.sendall(b" ")
        said = Connection(sock, timeout_s=20, limits=Limits())._next()
        assert "cannot be read" in said.content
    ours, theirs = socket.socketpair()
    with ours, theirs:
        visitor = PendingConnection(ours, Guard())
        visitor.counters.bytes_received = MAX_BYTES
        with pytest.raises(ProtocolError, match="at most 4096 bytes are accepted"):
            visitor.process()
        visitor = PendingConnection(ours, Guard())
        visitor.stream.raw_bytes_received = MAX_RAW_BYTES
        theirs.sendall(b"x")
        with pytest.raises(ConnectionLost, match="bytes before it was admitted"):
            visitor.process()


def test_a_talk_that_failed_lets_nobody_in() -> None:
    """What it could not be told, it is not taken to have answered."""
    ours, theirs = socket.socketpair()
    tokens = Tokens(Path("token"), TOKEN)
    visitor = PendingConnection(ours, Guard(tokens=tokens))
    with contextlib.suppress(BlockingIOError):
        while True:  # it reads nothing
            ours.send(bytes(65536))
    theirs.sendall(frame(MessageType.AUTHENTICATE, HELLO))
    with pytest.raises(ConnectionLost, match="takes nothing"):
        visitor.process()
    while len(theirs.recv(2**20)) == 2**20:
        pass
    theirs.sendall(frame(MessageType.PROOF, {"proof": "0" * 64}))
    with pytest.raises(AuthError, match="has not proved who it is"):
        visitor.process()
    link = DrainedLink()
    with pytest.raises(ProtocolError, match="has proved to be None"):
        link.check_proved(Peer(CLIENT, 0))
    ours.close()
    theirs.close()


class DrainedLink(Link):
    """A link over which somebody has come without a proof."""

    def __init__(self) -> None:
        super().__init__()
        self.must_prove = True

    def _send(self, message: Message) -> int:
        raise NotImplementedError

    def _next(self) -> Message:
        raise NotImplementedError


def test_no_exception_of_one_visitor_ends_the_others(
    launcher: Launcher, guarded: Program, tmp_path: Path
) -> None:
    listener = listen("127.0.0.1", 0)
    lines: list[str] = []

    def broken(visitor: PendingConnection) -> None:
        raise KeyError("a bug of ours")

    acceptor = Acceptor(listener, Guard(), broken, RefusalLog(note=lines.append))
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=20) as sock:
            sock.sendall(frame(MessageType.REGISTER))
            assert sock.recv(1) == b""
    acceptor.close()
    assert len([line for line in lines if "KeyError" in line]) == 2


def test_a_crowd_that_never_says_anything_keeps_nobody_out(launcher: Launcher) -> None:
    server = launcher.server(*FAST, "--clients", 1, "--max-pending", 8)
    wait_for(server, "listening")
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", launcher.port)))
            for _ in range(200)
        ]
        launcher.client().ended_with(0)
        server.ended_with(0)
        assert len(crowd) == 200
    log = next(launcher.folder.glob("server/*/server_log.txt")).read_text()
    assert log.count("made room for others") == 50  # no line for each of a crowd
