"""Who is let in: tokens, TLS, and what a server says to everybody else. Real processes."""

import contextlib
import datetime
import os
import re
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trustme
from hypothesis import given
from hypothesis import strategies as st

import sfl.archive
from sfl.auth import main as auth_main
from sfl.errors import AuthError, ConfigError, ConnectionLost, PeerFailed, ProtocolError
from sfl.files.checksum import crc32
from sfl.nodes import ServerNode
from sfl.transport.connection import Connection, is_loopback
from sfl.transport.dialling import listen, parse_address
from sfl.transport.doorstep import LET_IN_WITHIN_S, MAX_BYTES, MAX_RAW_BYTES, Doorstep, Visitor
from sfl.transport.guard import Guard, exposure, guard_of
from sfl.transport.tokens import FED, SERVER, Tokens, _agreed, _proof, read_tokens, write_tokens
from sfl.transport.turned_away import TurnedAway
from sfl.wire.framing import HEAD, MAGIC, VERSION, encode_head, pack_head
from sfl.wire.link import ANY_ID, CLIENT, MAIN, Link, Peer
from sfl.wire.messages import Limits, Message, MessageType
from tests.support.certificates import Certificates
from tests.support.launch import Launcher, Program, wait_for

FAST = ["--model", "mlp", "--batch-size", 200, "--rounds", 1]
TOKEN, OTHER = "t" * 40, "o" * 40


def token_file(folder: Path, *lines: str, name: str = "token") -> Path:
    path = folder / name
    write_tokens(path, list(lines))
    return path


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


# Token files


def test_new_tokens_are_secret_and_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "token"
    auth_main(["new-token", str(path)])
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_tokens(path).shared) >= 43  # 256 bits
    with pytest.raises(ConfigError, match="File exists"):
        auth_main(["new-token", str(path)])
    auth_main(["new-token", str(tmp_path / "all"), "--clients", "2"])
    everybody = read_tokens(tmp_path / "all")
    assert everybody.own is not None
    assert everybody.own.keys() == {"0", "1", "main"}
    for owner in everybody.own:
        theirs = read_tokens(tmp_path / f"all.{owner}")
        assert theirs.own == {owner: everybody.own[owner]}
        assert theirs.only_client == (None if owner == "main" else int(owner))


@pytest.mark.parametrize(
    "content",
    [
        "", "\n", "short", f"{TOKEN}\n{OTHER}", f"0 {TOKEN}\n{OTHER}", f"0 {TOKEN}\n0 {OTHER}",
        f"0 {TOKEN}\n1 {TOKEN}", f"01 {TOKEN}", f"-1 {TOKEN}", f"evil {TOKEN}", f"0 1 {TOKEN}",
        f"{TOKEN}\xe9", "a" * 600,
    ],
)  # fmt: skip
def test_what_is_no_token_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"--token-file {path}"):
        read_tokens(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, TOKEN)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        read_tokens(path)


def test_a_pipe_is_no_token_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError):
        read_tokens(tmp_path / "pipe")


def test_comments_and_tokens_for_each(tmp_path: Path) -> None:
    tokens = read_tokens(token_file(tmp_path, "# secret", "", f"0 {TOKEN}", f"main {OTHER}"))
    assert tokens.of(Peer(CLIENT, 0)) == TOKEN.encode()
    assert tokens.of(Peer(MAIN)) == OTHER.encode()
    assert tokens.of(Peer(CLIENT, 1)) is None
    assert tokens.of(Peer(CLIENT, ANY_ID)) is None


# The handshake


AGREED = _agreed(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "1" * 64, b"hash")


def test_a_proof_is_bound_to_all_that_was_agreed() -> None:
    proof = _proof(b"k", "caller", AGREED)
    others = [
        _agreed(Peer(CLIENT, 2), SERVER, "r", "0" * 64, "1" * 64, b"hash"),
        _agreed(Peer(MAIN, 1), SERVER, "r", "0" * 64, "1" * 64, b"hash"),
        _agreed(Peer(CLIENT, 1), FED, "r", "0" * 64, "1" * 64, b"hash"),
        _agreed(Peer(CLIENT, 1), SERVER, "s", "0" * 64, "1" * 64, b"hash"),
        _agreed(Peer(CLIENT, 1), SERVER, "r", "2" * 64, "1" * 64, b"hash"),
        _agreed(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "2" * 64, b"hash"),
        _agreed(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "1" * 64, b""),
        # Fields stand behind their lengths: what moves from one to the next is something else.
        _agreed(Peer(CLIENT, 1), SERVER, "r0", "0" * 63, "1" * 64, b"hash"),
    ]
    assert proof not in {_proof(b"k", "caller", other) for other in others}
    assert proof != _proof(b"k", "listener", AGREED)
    assert proof != _proof(b"l", "caller", AGREED)
    assert proof == _proof(b"k", "caller", AGREED)


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_only_the_same_fields_give_the_same_proof(one: list[bytes], other: list[bytes]) -> None:
    same = _proof(b"k", "caller", tuple(one)) == _proof(b"k", "caller", tuple(other))
    assert same == (one == other)


def answers(port: int, *frames: bytes) -> list[Message]:
    """Send frames to a server and return what it says until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        for frame in frames:
            sock.sendall(frame)
        connection = Connection(sock, timeout_s=20, limits=Limits())
        said = []
        with contextlib.suppress(Exception):
            while True:
                said.append(connection._next())
        return said


def frame(kind: MessageType, content: object = "") -> bytes:
    return encode_head(Message(kind, content=content))


def refusal(port: int, *frames: bytes) -> str:
    last = answers(port, *frames)[-1]
    assert last.type is MessageType.INVALID_MESSAGE
    return last.content


HELLO = {"role": "client", "client_id": 0, "nonce": "0" * 64}


@pytest.fixture
def guarded(launcher: Launcher, tmp_path: Path) -> Program:
    """A server that waits for one client with a token of its own."""
    path = token_file(tmp_path, f"0 {TOKEN}", f"1 {OTHER}")
    server = launcher.server(*FAST, "--clients", 1, "--run", "r", "--token-file", path)
    wait_for(server, "listening")
    return server


def test_who_lacks_the_token_is_refused_and_the_run_goes_on(
    launcher: Launcher, guarded: Program, tmp_path: Path
) -> None:
    port = launcher.port
    assert refusal(port, frame(MessageType.REGISTER)) == (
        "this server asks for a token: give --token-file"
    )
    assert "sent MESSAGE" in refusal(port, frame(MessageType.MESSAGE))
    wrong = frame(MessageType.AUTHENTICATE, HELLO), frame(MessageType.PROOF, {"proof": "0" * 64})
    assert "not the one of this server" in refusal(port, *wrong)
    no_text = frame(MessageType.AUTHENTICATE, HELLO), frame(MessageType.PROOF, {"proof": "\xe9"})
    assert "not the one of this server" in refusal(port, *no_text)
    for other in ({"role": "king"}, {"client_id": -2}, {"client_id": 2**40}, {"nonce": "0"}):
        assert refusal(port, frame(MessageType.AUTHENTICATE, HELLO | other))
    without = launcher.client("--client-id", 0).ended_with(1)
    assert without.endswith("this server asks for a token: give --token-file")
    for name, line in (("wrong", f"0 {'x' * 40}"), ("unknown", f"7 {TOKEN}")):
        path = token_file(tmp_path, line, name=name)
        refused = launcher.client("--token-file", path).ended_with(1)
        assert f"the server does not have the token of --token-file {path}" in refused
    mine = token_file(tmp_path, f"1 {OTHER}", name="mine")
    another = launcher.client("--client-id", 0, "--token-file", mine).ended_with(2)
    assert f"--token-file {mine}: has no token for --client-id 0" in another
    right = token_file(tmp_path, f"0 {TOKEN}", name="right")
    launcher.client("--token-file", right).ended_with(0)
    guarded.ended_with(0)
    for text in (guarded.out, *(p.read_text() for p in launcher.folder.rglob("*.txt"))):
        assert TOKEN not in text
    assert TOKEN not in (launcher.folder / "server/r/config.json").read_text()


def test_a_recorded_handshake_is_of_no_use_again(launcher: Launcher, guarded: Program) -> None:
    """Nor is a client's id when it registers as another one."""
    sock = socket.create_connection(("127.0.0.1", launcher.port), timeout=20)
    with Connection(sock, timeout_s=20, limits=Limits()) as connection:
        hello = frame(MessageType.AUTHENTICATE, HELLO)
        connection.send_message_as_json(MessageType.AUTHENTICATE, content=HELLO)
        challenge = connection.receive_message_as_json(MessageType.CHALLENGE).content
        agreed = _agreed(Peer(CLIENT, 0), SERVER, "r", "0" * 64, challenge["nonce"], b"")
        assert challenge["proof"] == _proof(TOKEN.encode(), "listener", agreed)
        content = {"proof": _proof(TOKEN.encode(), "caller", agreed)}
        connection.send_message_as_json(MessageType.PROOF, content=content)
        register = {"client_id": 1, "instance": "0" * 32, "heartbeat_s": 1.0, "fingerprint": {}}
        connection.send_message_as_json(MessageType.REGISTER, content=register)
        with pytest.raises(
            PeerFailed, match="registers as client_1, but has proved to be client_0"
        ):
            connection.receive_message_as_json(MessageType.REGISTERED)
    again = hello, frame(MessageType.PROOF, content)
    assert "not the one of this server" in refusal(launcher.port, *again)


def test_a_proof_of_the_servers_own_is_no_clients(launcher: Launcher, guarded: Program) -> None:
    """A reflected proof: what the server says is for servers alone."""
    sock = socket.create_connection(("127.0.0.1", launcher.port), timeout=20)
    with Connection(sock, timeout_s=20, limits=Limits()) as connection:
        connection.send_message_as_json(MessageType.AUTHENTICATE, content=HELLO)
        challenge = connection.receive_message_as_json(MessageType.CHALLENGE).content
        content = {"proof": challenge["proof"]}
        connection.send_message_as_json(MessageType.PROOF, content=content)
        with pytest.raises(PeerFailed, match="not the one of this server"):
            connection.receive_message_as_json(MessageType.REGISTERED)


def test_a_client_tells_a_server_without_the_token_nothing(
    launcher: Launcher, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", launcher.port)) as listener:
        path = token_file(tmp_path, TOKEN)
        client = launcher.client("--token-file", path, "--reconnect-timeout", 0)
        sock, _ = listener.accept()
        with Connection(sock, timeout_s=20, limits=Limits()) as fake:
            hello = fake.receive_message_as_json(MessageType.AUTHENTICATE)
            assert hello.content.keys() == HELLO.keys()
            content = {"run": "r", "nonce": "1" * 64, "proof": "2" * 64}
            fake.send_message_as_json(MessageType.CHALLENGE, content=content)
            with pytest.raises(PeerFailed, match="does not have the token"):
                fake.receive_message_as_json(MessageType.PROOF, MessageType.REGISTER)
    assert "does not have the token" in client.ended_with(1)


def test_a_client_with_a_token_wants_a_server_with_one(launcher: Launcher, tmp_path: Path) -> None:
    server = launcher.server(*FAST, "--clients", 1)
    wait_for(server, "listening")
    line = launcher.client("--token-file", token_file(tmp_path, TOKEN)).ended_with(1)
    assert line.endswith("this server has no token: leave out --token-file, or give it one")
    launcher.client().ended_with(0)
    server.ended_with(0)


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True])
def test_clients_and_a_fed_server_with_tokens_of_their_own(
    launcher: Launcher, tmp_path: Path, certificates: Certificates, tls: bool
) -> None:
    trust = ["--tls-ca", certificates.trust] if tls else []
    shown = certificates.issue("server") if tls else []
    auth_main(["new-token", str(tmp_path / "tokens"), "--clients", "2"])
    every, own = tmp_path / "tokens", [tmp_path / f"tokens.{k}" for k in ("0", "1", "main")]
    fed = launcher.fed("--token-file", every, "--port", 0, *shown)
    wait_for(fed, "listening on ")
    address = re.search(r"listening on (\S+) for", fed.out)
    assert address
    port = parse_address(address[1])[1]
    early = frame(MessageType.REGISTER, {"role": "main"})
    assert ("speaks TLS alone" if tls else "asks for a token") in refusal(port, early)
    as_client = [*FAST, "--clients", 2, "--role", "main", "--fed-server", address[1], "--run", "r"]
    server = launcher.server(*as_client, "--token-file", every, *shown, *trust)
    clients = [launcher.client("--token-file", path, *trust) for path in own[:2]]
    for program in (server, fed, *clients):
        program.ended_with(0)
    assert sfl.archive.open(launcher.folder / "server/r").config()["token_file"] == str(every)


def test_the_same_weights_with_token_and_tls(
    launcher: Launcher, tmp_path: Path, certificates: Certificates
) -> None:
    plain = Launcher(tmp_path / "plain")
    plain.folder.mkdir()
    options = ["--model", "mlp", "--batch-size", 200, "--rounds", 2]
    whole = plain.run(*options, clients=2)
    path = token_file(tmp_path, TOKEN)
    own = certificates.issue("server")
    tls = ["--tls-client-ca", certificates.trust, "--token-file", path, *own]
    mine = ["--tls-ca", certificates.trust, *certificates.issue("client"), "--token-file", path]
    secured = launcher.run(*options, *tls, clients=2, client_options=mine)
    for name in ("client_model_001.pt", "server_model_001.pt"):
        ours, theirs = (torch.load(f / "models" / name) for f in (whole, secured))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# TLS


@pytest.fixture
def secured(launcher: Launcher, certificates: Certificates) -> Iterator[Program]:
    server = launcher.server(*FAST, "--clients", 1, *certificates.issue("server"))
    wait_for(server, "listening")
    yield server
    launcher.client("--tls-ca", certificates.trust).ended_with(0)  # whatever was tried before
    server.ended_with(0)


def test_plain_text_to_a_tls_port_is_answered_and_nothing_else(
    launcher: Launcher, secured: Program
) -> None:
    line = launcher.client().ended_with(1)
    assert line.endswith("the server refused: this server speaks TLS alone: give --tls-ca")
    assert answers(launcher.port, b"GET / HTTP/1.1\r\n\r\n")[-1].content.startswith("this server")


def test_tls_to_a_plain_port_is_never_tried_again_in_plain_text(
    launcher: Launcher, certificates: Certificates
) -> None:
    server = launcher.server(*FAST, "--clients", 1)
    wait_for(server, "listening")
    line = launcher.client("--tls-ca", certificates.trust).ended_with(1)
    assert "the server at 127.0.0.1 does not speak TLS 1.3 with us (wrong version number)" in line
    log = next(launcher.folder.glob("server/*/server_log.txt")).read_text()
    assert log.count("turned away") == 1
    launcher.client().ended_with(0)
    server.ended_with(0)


def test_a_foreign_certificate_is_not_trusted(
    launcher: Launcher, secured: Program, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.pem"
    trustme.CA().cert_pem.write_to_path(foreign)
    line = launcher.client("--tls-ca", foreign).ended_with(1)
    assert "the certificate of the server at 127.0.0.1 is not to be trusted" in line


@pytest.mark.parametrize(
    ("hosts", "options", "why"),
    [
        (
            ["127.0.0.1"],
            {"not_after": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)},
            "expired",
        ),
        (["other.example"], {}, "IP address mismatch"),
    ],
)
def test_a_certificate_that_does_not_fit_is_not_trusted(
    launcher: Launcher,
    certificates: Certificates,
    hosts: list[str],
    options: dict[str, object],
    why: str,
) -> None:
    server = launcher.server(*FAST, "--clients", 1, *certificates.issue("bad", *hosts, **options))
    wait_for(server, "listening")
    assert why in launcher.client("--tls-ca", certificates.trust).ended_with(1)


def test_older_tls_is_refused(
    launcher: Launcher, secured: Program, certificates: Certificates
) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1):
        context = ssl.create_default_context(cafile=str(certificates.trust))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
            context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server that refuses
        with (
            socket.create_connection(("127.0.0.1", launcher.port), timeout=20) as sock,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            context.wrap_socket(sock, server_hostname="127.0.0.1")


def test_only_clients_with_a_certificate_may_connect_if_one_is_wanted(
    launcher: Launcher, certificates: Certificates, tmp_path: Path
) -> None:
    wants = ["--tls-client-ca", certificates.trust, *certificates.issue("server")]
    server = launcher.server(*FAST, "--clients", 1, *wants)
    wait_for(server, "listening")
    trust = ["--tls-ca", certificates.trust]
    assert "the server refused us: " in launcher.client(*trust).ended_with(1)
    foreign = Certificates(tmp_path / "foreign")
    foreign.folder.mkdir()
    assert "refused us: " in launcher.client(*trust, *foreign.issue("mine")).ended_with(1)
    launcher.client(*trust, *certificates.issue("mine")).ended_with(0)
    server.ended_with(0)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--tls-cert", "nothing.pem", "--tls-key", "nothing.key"], "No such file"),
        (["--tls-cert", "nothing.pem"], "give both, or none"),
        (["--tls-client-ca", "ca.pem"], "is for a server with --tls-cert"),
        (["--tls-ca", "ca.pem"], "is for clients, and for --role main"),
        (["--token-file", "nothing"], "No such file"),
        (["--host", "0.0.0.0"], "give --token-file"),
        (["--host", "::"], "give --token-file"),
    ],
)
def test_a_server_that_cannot_be_safe_does_not_start(
    launcher: Launcher, argv: list[str], why: str
) -> None:
    assert why in launcher.server(*argv).ended_with(2)
    assert not (launcher.folder / "server").exists()


def test_an_encrypted_key_is_refused_without_a_question(
    launcher: Launcher, certificates: Certificates
) -> None:
    own = certificates.issue("server")
    key = Path(str(own[3]))
    lines = key.read_text().replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    key.write_text(lines.replace("RSA ENCRYPTED", "ENCRYPTED").replace("EC ENCRYPTED", "ENCRYPTED"))
    assert "--tls-key" in launcher.server(*own).ended_with(2)


def test_what_is_said_of_a_server_that_others_can_reach(tmp_path: Path) -> None:
    path = str(token_file(tmp_path, TOKEN))
    assert exposure(ServerNode()) == ["only this machine can connect; --host 0.0.0.0 lets others"]
    (insecure, no_tls) = exposure(ServerNode(host="0.0.0.0", insecure=True))
    assert "whoever reaches the port can take part" in insecure
    assert "can read and alter what travels" in no_tls
    (line,) = exposure(ServerNode(host="0.0.0.0", token_file=path))
    assert "a token protects the start of a connection, not what follows" in line
    assert exposure(ServerNode(host="0.0.0.0", token_file=path, tls_cert="c", tls_key="k")) == []
    assert guard_of(ServerNode(host="0.0.0.0", insecure=True), SERVER).tokens is None
    with pytest.raises(ConfigError, match="--insecure"):
        guard_of(ServerNode(host="0.0.0.0"), SERVER)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "192.0.2.1", "")] == [False] * 4


# Before anybody is known


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["token"], ["tls"]])
def test_whoever_says_nothing_or_little_is_sent_away_after_ten_seconds(
    launcher: Launcher, tmp_path: Path, certificates: Certificates, options: list[str]
) -> None:
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
        while silent.recv(1000):
            pass
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
        visitor = Visitor(ours, Guard())
        visitor.counters.bytes_received = MAX_BYTES
        with pytest.raises(ProtocolError, match="at most 4096 bytes may come"):
            visitor.go_on()
        visitor = Visitor(ours, Guard())
        visitor.stream.raw_received = MAX_RAW_BYTES
        theirs.sendall(b"x")
        with pytest.raises(ConnectionLost, match="bytes of TLS"):
            visitor.go_on()


def test_a_talk_that_failed_lets_nobody_in() -> None:
    """What it could not be told, it is not taken to have answered."""
    ours, theirs = socket.socketpair()
    tokens = Tokens(Path("token"), TOKEN)
    visitor = Visitor(ours, Guard(tokens=tokens))
    with contextlib.suppress(BlockingIOError):
        while True:  # it reads nothing
            ours.send(bytes(65536))
    theirs.sendall(frame(MessageType.AUTHENTICATE, HELLO))
    with pytest.raises(ConnectionLost, match="takes nothing"):
        visitor.go_on()
    while len(theirs.recv(2**20)) == 2**20:
        pass
    theirs.sendall(frame(MessageType.PROOF, {"proof": "0" * 64}))
    with pytest.raises(AuthError, match="has not proved who it is"):
        visitor.go_on()
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

    def broken(visitor: Visitor) -> None:
        raise KeyError("a bug of ours")

    doorstep = Doorstep(listener, Guard(), broken, TurnedAway(note=lines.append))
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=20) as sock:
            sock.sendall(frame(MessageType.REGISTER))
            assert sock.recv(1) == b""
    doorstep.close()
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
