"""Who is let in: tokens, TLS, and what a server says to everybody else. Real processes."""

import os
import re
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfl.archive
from sfl.auth import main as auth_main
from sfl.errors import ConfigError, PeerFailed
from sfl.transport.addresses import parse_address
from sfl.transport.connection import Connection
from sfl.transport.tokens import FED, SERVER, _proof, _proof_fields, read_tokens
from sfl.wire.link import ANY_ID, CLIENT, MAIN, Peer
from sfl.wire.messages import Limits, MessageType
from tests.support.certificates import Certificates
from tests.support.handshakes import FAST, HELLO, OTHER, TOKEN, frame, refusal, token_file
from tests.support.launch import SCHEMES, Launcher, Program, wait_for

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


AGREED = _proof_fields(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "1" * 64, b"hash")


def test_a_proof_is_bound_to_all_that_was_agreed() -> None:
    proof = _proof(b"k", "caller", AGREED)
    others = [
        _proof_fields(Peer(CLIENT, 2), SERVER, "r", "0" * 64, "1" * 64, b"hash"),
        _proof_fields(Peer(MAIN, 1), SERVER, "r", "0" * 64, "1" * 64, b"hash"),
        _proof_fields(Peer(CLIENT, 1), FED, "r", "0" * 64, "1" * 64, b"hash"),
        _proof_fields(Peer(CLIENT, 1), SERVER, "s", "0" * 64, "1" * 64, b"hash"),
        _proof_fields(Peer(CLIENT, 1), SERVER, "r", "2" * 64, "1" * 64, b"hash"),
        _proof_fields(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "2" * 64, b"hash"),
        _proof_fields(Peer(CLIENT, 1), SERVER, "r", "0" * 64, "1" * 64, b""),
        # Fields stand behind their lengths: what moves from one to the next is something else.
        _proof_fields(Peer(CLIENT, 1), SERVER, "r0", "0" * 63, "1" * 64, b"hash"),
    ]
    assert proof not in {_proof(b"k", "caller", other) for other in others}
    assert proof != _proof(b"k", "listener", AGREED)
    assert proof != _proof(b"l", "caller", AGREED)
    assert proof == _proof(b"k", "caller", AGREED)


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_only_the_same_fields_give_the_same_proof(one: list[bytes], other: list[bytes]) -> None:
    same = _proof(b"k", "caller", tuple(one)) == _proof(b"k", "caller", tuple(other))
    assert same == (one == other)


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
        agreed = _proof_fields(Peer(CLIENT, 0), SERVER, "r", "0" * 64, challenge["nonce"], b"")
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
@pytest.mark.parametrize(("launcher", "tls"), [("ws", False), ("tcp", True)], indirect=["launcher"])
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
    over = f"{SCHEMES[launcher.transport]}{address[1]}"
    as_client = [*FAST, "--clients", 2, "--role", "main", "--fed-server", over, "--run", "r"]
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
