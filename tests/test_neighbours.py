"""Neighbours in a chain of parties: what they prove to each other, and whom they know."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfl.cli import main_client, main_server
from sfl.runtime import following
from tests.support.certificates import Certificates
from tests.support.handshakes import OTHER, TOKEN, token_file
from tests.support.launch import (
    TIMEOUT_S,
    Launcher,
    Program,
    free_port,
    options_of,
    wait_for,
    was_killed,
)
from tests.support.machines import Machines, machines, remote_addresses
from tests.support.parties import weights_of_all
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

RUN = {"model": "mlp", "batch_size": 200, "topology": "multi-hop", "cut": "3,5", "rounds": 1}
NEIGHBOURS = {
    "server": {"hop_2"},
    "hop_2": {"server", "hop_1"},
    "hop_1": {"hop_2", "client_0", "client_1"},
    "client_0": {"hop_1"},
    "client_1": {"hop_1"},
}
PORT = 8765
BETWEEN = "b" * 40  # the token of hop and server


def test_tokens_and_tls_between_every_two_neighbours(launcher: Launcher, tmp_path: Path) -> None:
    """Each pair has secrets of its own; who has those of another pair is refused in one line."""
    nearer, further = (Certificates(tmp_path / name) for name in ("nearer", "further"))
    for certificates in (nearer, further):
        certificates.folder.mkdir()
    own = f"0 {TOKEN}", f"1 {OTHER}"
    of_clients = token_file(tmp_path, *own, name="of-clients")
    mine = [token_file(tmp_path, line, name=f"of-{k}") for k, line in enumerate(own)]
    between = token_file(tmp_path, BETWEEN, name="between")
    wrong = token_file(tmp_path, "x" * 40, name="wrong")
    ports = [free_port() for _ in range(4)]

    def start_hop(
        port: int, *tokens: object, place: int = 1, trust: Path = further.trust, **crash: str
    ) -> Program:
        of_hop = [*nearer.issue(f"hop-{port}"), "--tls-ca", trust]
        return launcher.hop(place, port, launcher.port, *of_hop, *tokens, env=crash)

    def refused(port: int, token: Path, trust: Path = nearer.trust) -> str:
        server = ["--server", f"127.0.0.1:{port}", "--tls-ca", trust]
        return launcher.client(*server, "--client-id", 0, "--token-file", token).ended_with(1)

    of_server = ["--token-file", between, *further.issue("server"), "--clients", 2, "--run", "r"]
    server = launcher.server(*options_of(RUN), *of_server)
    asks = "--token-file", of_clients
    shows = "--next-token-file", between
    right = start_hop(ports[0], *asks, *shows, SFL_CRASH_AT="step.after_answer:4")
    others = [
        start_hop(ports[1], *asks, "--next-token-file", wrong),
        start_hop(ports[2], *asks, *shows, place=2),
        start_hop(ports[3], *asks, *shows, trust=nearer.trust),
    ]
    for program in (server, right, *others):
        wait_for(program, "listening")
    assert "tokens of clients; give --next-token-file" in start_hop(free_port(), *asks).ended_with(
        2
    )
    assert "the server does not have the token" in refused(ports[0], wrong)
    for port, other, why in (
        (ports[1], others[0], f"does not have the token of --token-file {wrong}"),
        (ports[3], others[2], "is not to be trusted"),
    ):
        assert "hop 1 and the party behind it do not trust each other" in refused(port, mine[0])
        wait_for(other, why)
    # A client at the server and at hop 2, where a hop should be.
    assert "client_0 connects where a hop:1 should" in refused(
        launcher.port, between, further.trust
    )
    assert "client_0 connects where a hop:1 should" in refused(ports[2], mine[0])
    assert "is not to be trusted" in refused(ports[0], mine[0], further.trust)
    # Who proves to be another client than it registers as is tried by ``test_hostile``.

    at_hop = ["--server", f"127.0.0.1:{ports[0]}", "--tls-ca", nearer.trust]
    clients = [
        launcher.client(*at_hop, "--client-id", k, "--token-file", token)
        for k, token in enumerate(mine)
    ]
    was_killed(right)
    right = start_hop(ports[0], *asks, *shows)
    for program in (*clients, right, server):
        program.ended_with(0)
    whole = simulated(tmp_path / "whole", **RUN, clients=2)
    assert_equal(
        weights_of_all(launcher.folder / "server" / "r"), weights_of_all(whole), at_least=4
    )


def impatient(argv: list[str]) -> int:
    """Run a server, or a hop that soon gives up reaching the next party."""
    following.NEXT_WITHIN_S = 1.0
    return main_server(argv)


@pytest.fixture
def five() -> Iterator[Machines]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(machines(*NEIGHBOURS))
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made


def test_each_party_knows_its_neighbours_alone(
    launcher: Launcher, five: Machines, tmp_path: Path
) -> None:
    """Each has a machine; the last in the chain starts last, and a hop is killed meanwhile."""
    shared = ["--token-file", token_file(tmp_path, TOKEN)]
    run = RUN | {"cut": "1,3,5", "clients": 2}
    next_party = {"hop_1": "hop_2", "hop_2": "server", "client_0": "hop_1", "client_1": "hop_1"}

    def start(name: str, env: dict[str, str] | None = None) -> Program:
        kind, _, number = name.partition("_")
        argv = [*shared, "--out", tmp_path / name]
        to = f"{five.address(next_party[name])}:{PORT}" if name in next_party else ""
        if kind == "client":
            argv += ["--server", to, "--client-id", number]
            return launcher.start(name, five.inside(name, main_client), argv, env)
        argv += ["--host", five.address(name), "--port", PORT]
        argv += (
            ["--role", f"hop:{number}", "--next", to] if to else [*options_of(run), "--run", "r"]
        )
        return launcher.start(name, five.inside(name, impatient), argv, env)

    crash = {"SFL_CRASH_AT": "step.after_answer:4"}
    programs = {n: start(n, crash if n == "hop_2" else None) for n in [*NEIGHBOURS][:0:-1]}
    wait_for(programs["client_0"], "hop 2 does not reach the party behind it")
    programs["server"] = start("server")
    ends = {name: set[str]() for name in NEIGHBOURS}
    until = time.monotonic() + TIMEOUT_S
    while any(program.process.is_alive() for program in programs.values()):
        assert time.monotonic() < until, {n: p.out + p.err for n, p in programs.items()}
        for name, program in programs.items():
            ends[name] |= remote_addresses(program)
        programs["server"].process.join(0.01)
        if programs["hop_2"].process.exitcode == -9:
            programs["hop_2"] = start("hop_2")
    for program in programs.values():
        program.ended_with(0)

    by_address = {five.address(name): name for name in NEIGHBOURS}
    for name, neighbours in NEIGHBOURS.items():
        assert {by_address[a] for a in ends[name]} == neighbours, name
        logs = "".join(p.out + p.err for p in launcher.programs if p.log.name.startswith(name))
        files = [p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()]
        written = b"".join(files) + logs.encode()
        known = {other for address, other in by_address.items() if address.encode() in written}
        assert known - {name} <= neighbours, name
    hops = [tmp_path / f"hop_{place}" / f"hop_{place}" / "r" for place in (1, 2)]
    ours = {k: t for f in (tmp_path / "server/server/r", *hops) for k, t in weights(f).items()}
    assert_equal(ours, weights_of_all(simulated(tmp_path / "whole", **run)), at_least=4)
