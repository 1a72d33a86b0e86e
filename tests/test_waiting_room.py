"""Before a run begins: as tolerant as in mid-run; and whoever comes again and again."""

import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.hostile.insiders import TIMES, takes_its_own_place
from experiments.hostile.target import Target, frame
from experiments.support.slow_link import SlowLink
from sfl.auth import main as auth_main
from sfl.errors import RunError
from sfl.runtime.client_places import TAKEN_OVER
from sfl.transport.listener import listen
from sfl.transport.rate_limit import RateLimit
from sfl.transport.refusal_log import EVERY_S, MAX_CONSOLE_LINES, RefusalLog
from sfl.transport.tokens import read_tokens
from sfl.wire.messages import Limits, MessageType
from tests.support.certificates import Certificates
from tests.support.dial import dial
from tests.support.launch import Launcher, options_of, send_signal, wait_for
from tests.support.runs import FAST
from tests.support.simulations import reference
from tests.support.weights import assert_same


@pytest.mark.slow
def test_a_client_that_was_suspended_while_it_waited_takes_part(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = {"model": "mlp", "batch_size": 200, "rounds": 1, "clients": 2, "run": "r"}
    server = launcher.server(*options_of(run), "--peer-timeout", 1)
    asleep = launcher.client("--client-id", 0, "--peer-timeout", 1)
    wait_for(server, "client_0 is ready")
    send_signal(asleep, signal.SIGSTOP)
    wait_for(server, "client_0 is away: client_0 sent nothing for 1 seconds")
    send_signal(asleep, signal.SIGCONT)
    other = launcher.client("--client-id", 1, "--peer-timeout", 1)
    for program in (server, asleep, other):
        program.ended_with(0)
    assert "trying for 600 seconds to reach the server again" in asleep.out
    assert_same(reference(tmp_path / "whole", run), launcher.folder / "server/r")


def test_a_waiting_client_whose_connection_breaks_comes_back(launcher: Launcher) -> None:
    server = launcher.server(*FAST, "--clients", 2, "--rounds", 1)
    breaks = iter([5000.0])  # of one direction of the first connection: in the waiting room
    link = SlowLink("127.0.0.1", launcher.port, flip_after=lambda: next(breaks, float("inf")))
    waits = launcher.client("--client-id", 0, "--server", link.address)
    wait_for(server, "client_0 is ready")
    for sock in link._sockets:
        with contextlib.suppress(OSError):  # the other end of it may be closed
            sock.shutdown(socket.SHUT_RDWR)
    wait_for(server, "client_0 is away")
    other = launcher.client("--client-id", 1)
    try:
        for program in (server, waits, other):
            program.ended_with(0)
    finally:
        link.close()


@pytest.mark.parametrize("way", [0, 1], ids=["up", "down"])
def test_a_bit_that_is_flipped_before_the_run_begins_makes_a_new_connection(
    launcher: Launcher, tmp_path: Path, way: int
) -> None:
    """In the handshake, in REGISTER and REQUEST_TO_START and in what the server says to them."""
    auth_main(["new-token", str(tmp_path / "token")])
    token = ["--token-file", tmp_path / "token"]
    server = launcher.server(*FAST, "--clients", 1, "--rounds", 1, *token)
    wait_for(server, "listening")
    places = iter([2, 200, 500, 900])  # bytes, of one connection after the other
    asked = iter(range(10**6))

    def flip_after() -> float:
        return next(places, float("inf")) if next(asked) % 2 == way else float("inf")

    link = SlowLink("127.0.0.1", launcher.port, flip_after=flip_after)
    client = launcher.client("--server", link.address, *token)
    try:
        for program in (server, client):
            program.ended_with(0)
    finally:
        link.close()
    assert link.num_flipped == 4
    assert "arrived damaged: its checksum differs" in client.out


@pytest.mark.slow
@pytest.mark.parametrize("way", [0, 1], ids=["up", "down"])
def test_a_bit_that_is_flipped_under_tls_makes_a_new_connection(
    launcher: Launcher, tmp_path: Path, way: int
) -> None:
    """In the handshake, and in what is enciphered."""
    ca = Certificates(tmp_path)
    server = launcher.server(*FAST, "--clients", 1, "--rounds", 1, *ca.issue("server"))
    wait_for(server, "listening")
    places = iter([100, 300, 1500, 20_000])
    asked = iter(range(10**6))

    def flip_after() -> float:
        return next(places, float("inf")) if next(asked) % 2 == way else float("inf")

    link = SlowLink("127.0.0.1", launcher.port, flip_after=flip_after)
    client = launcher.client("--server", link.address, "--tls-ca", ca.trust)
    try:
        for program in (server, client):
            program.ended_with(0)
    finally:
        link.close()
    assert link.num_flipped == 4


# Names


def resolving(after: int) -> Callable[..., Any]:
    """Return a resolver that knows ``late.example`` from its ``after``-th question on."""
    ask, asked = socket.getaddrinfo, []

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        if host == "late.example":
            asked.append(host)
            if len(asked) <= after:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask("127.0.0.1" if host == "late.example" else host, *rest, **more)

    return resolve


def test_a_name_that_is_not_known_yet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with listen("127.0.0.1", 0) as listener:
        monkeypatch.setattr(socket, "getaddrinfo", resolving(after=2))
        with dial(f"late.example:{listener.port}", patience_s=20, limits=Limits(),
            on_wait=said.append):  # fmt: skip
            pass
    assert said == [
        f"waiting for the server at late.example:{listener.port} (unknown host 'late.example':"
        " Name or service not known); trying for 20 seconds"
    ]


def test_a_name_that_never_is_known_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving(after=10**6))
    began = time.monotonic()
    with pytest.raises(RunError, match=r"within 0\.5 seconds \(unknown host 'late\.example'"):
        dial("late.example:80", patience_s=0.5, limits=Limits(),
            on_wait=lambda line: None)  # fmt: skip
    assert time.monotonic() - began < 5


# Whoever comes too often


@pytest.mark.slow
def test_a_client_that_takes_its_own_place_in_a_loop_is_slowed_down(launcher: Launcher) -> None:
    server = launcher.server(*FAST, "--clients", 2, "--rounds", 1)
    honest = launcher.client("--client-id", 1)
    wait_for(server, "client_1 is ready")
    began = time.monotonic()
    answer = takes_its_own_place(Target("127.0.0.1", launcher.port))
    most = 1 + TAKEN_OVER[0] + (time.monotonic() - began) / TAKEN_OVER[1] + 1
    given = int(answer.removeprefix("the place was given ").partition(" ")[0])
    assert TAKEN_OVER[0] <= given <= most < TIMES
    late = launcher.client("--client-id", 0)
    for program in (server, honest, late):
        program.ended_with(0)


def test_an_allowance_is_regained() -> None:
    allowance = RateLimit(2, 0.05)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    deadline = time.monotonic() + 5
    while not allowance.take():
        assert time.monotonic() < deadline
    assert RateLimit(2, 1e-9).take()


# The door


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (frame(), "this server asks for a token: give --token-file"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak the SFL protocol"),
    ],
)
def test_who_is_turned_away_is_a_line_on_the_servers_console(
    launcher: Launcher, tmp_path: Path, sent: bytes, line: str
) -> None:
    auth_main(["new-token", str(tmp_path / "token")])
    server = launcher.server(*FAST, "--clients", 1, "--token-file", tmp_path / "token")
    wait_for(server, "listening")
    target = Target("127.0.0.1", launcher.port)
    for _ in range(3 * MAX_CONSOLE_LINES):
        assert target.ask(sent).startswith(MessageType.INVALID_MESSAGE)
    log = next(launcher.folder.glob("server/*/server_log.txt"))
    assert server.out.count("turned away 127.0.0.1:") == MAX_CONSOLE_LINES
    assert server.out.count(line) == MAX_CONSOLE_LINES
    assert log.read_text().count(line) == 3 * MAX_CONSOLE_LINES


def test_a_client_with_a_wrong_token_is_a_line_on_the_servers_console(
    launcher: Launcher, tmp_path: Path
) -> None:
    for name in ("token", "other"):
        auth_main(["new-token", str(tmp_path / name)])
    server = launcher.server(*FAST, "--clients", 1, "--token-file", tmp_path / "token")
    wait_for(server, "listening")
    target = Target("127.0.0.1", launcher.port, tokens=read_tokens(tmp_path / "other"))
    hello = {"role": "client", "client_id": 0, "nonce": "0" * 64}
    target.ask(
        frame(hello, MessageType.AUTHENTICATE), frame({"proof": "0" * 64}, MessageType.PROOF)
    )
    assert "turned away 127.0.0.1:" in server.out
    assert "the token is not the one of this server" in server.out


def test_the_rest_of_a_crowd_is_counted() -> None:
    said: list[str] = []
    noted: list[str] = []
    turned_away = RefusalLog(said.append, noted.append)
    for _ in range(100):
        turned_away.add("a", "wrong token")
    turned_away.add("a", "closed the connection", on_console=False)
    turned_away.summarise(time.monotonic())
    assert (len(said), len(noted)) == (10, 50)
    turned_away.summarise(time.monotonic() + EVERY_S)
    assert said[10:] == ["turned away 90 more connections in 60 seconds"]
    assert noted[50:] == ["turned away 41 more connections in 60 seconds"]
    turned_away.add("b", "closed\nthe connection", on_console=False)
    assert noted[51:] == ["turned away b: closed the connection"]
    assert len(said) == 11
