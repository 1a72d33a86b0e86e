"""Neighbours in a chain of parties: what they prove to each other, and whom they know."""

from pathlib import Path

from tests.support.certificates import Certificates
from tests.support.handshakes import OTHER, TOKEN, token_file
from tests.support.hops import weights_of_all
from tests.support.launch import Launcher, Program, free_port, options_of, wait_for
from tests.support.simulations import simulated
from tests.support.weights import assert_equal

RUN = {"model": "mlp", "batch_size": 200, "topology": "multi-hop", "cut": "3,5", "rounds": 1}
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

    def hop(port: int, *tokens: object, place: int = 1, trust: Path = further.trust) -> Program:
        of_hop = [*nearer.issue(f"hop-{port}"), "--tls-ca", trust]
        return launcher.hop(place, port, launcher.port, *of_hop, *tokens)

    def refused(port: int, token: Path, trust: Path = nearer.trust) -> str:
        server = ["--server", f"127.0.0.1:{port}", "--tls-ca", trust]
        return launcher.client(*server, "--client-id", 0, "--token-file", token).ended_with(1)

    of_server = ["--token-file", between, *further.issue("server"), "--clients", 2, "--run", "r"]
    server = launcher.server(*options_of(RUN), *of_server)
    asks = "--token-file", of_clients
    right = hop(ports[0], *asks, "--next-token-file", between)
    others = [
        hop(ports[1], *asks, "--next-token-file", wrong),
        hop(ports[2], *asks, "--next-token-file", between, place=2),
        hop(ports[3], *asks, "--next-token-file", between, trust=nearer.trust),
    ]
    for program in (server, right, *others):
        wait_for(program, "listening")
    assert "tokens of clients; give --next-token-file" in hop(free_port(), *asks).ended_with(2)
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
    for program in (*clients, right, server):
        program.ended_with(0)
    whole = simulated(tmp_path / "whole", **RUN, clients=2)
    assert_equal(
        weights_of_all(launcher.folder / "server" / "r"), weights_of_all(whole), at_least=4
    )
