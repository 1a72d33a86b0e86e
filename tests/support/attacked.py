"""What is attacked: a server that waits for its client, and a hop in the middle of a run."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from sfl.archive.checkpoint import checkpoint_paths, round_of
from tests.support.certificates import Certificates
from tests.support.handshakes import token_file
from tests.support.launch import TIMEOUT_S, Launcher, free_port, options_of, wait_for
from tests.support.simulations import simulated

RUN = {"model": "mlp", "batch_size": 200, "clients": 1, "run": "r"}
OVER_HOP = {"topology": "multi-hop", "cut": "3,5"}
KEPT = 20  # the round of the run over a hop whose weights are compared
LONG = {"rounds": 5000, "keep_tensors": "none", "keep_models": f"every:{KEPT}"}


@contextlib.contextmanager
def waiting_server(launcher: Launcher, tokens: Path, ca: Certificates) -> Iterator[int]:
    """Run a server whose client comes at the end; give its port."""
    guarded = ["--transport", "ws", "--token-file", tokens, *ca.issue("server")]
    server = launcher.server(*options_of(RUN | {"rounds": 1}), *guarded)
    wait_for(server, "listening")
    yield launcher.port
    launcher.client(*_client(launcher, launcher.port, ca)).ended_with(0)
    server.ended_with(0)


@contextlib.contextmanager
def hop_of_a_run(launcher: Launcher, tokens: Path, ca: Certificates) -> Iterator[int]:
    """Run client, hop and server, and give the hop's port; then compare weights of the run."""
    between = ["--token-file", token_file(launcher.folder, "b" * 40, name="between")]
    server = launcher.server(*options_of(RUN | OVER_HOP | LONG), *between, *ca.issue("server"))
    port, next_one = free_port(), ["--next-token-file", between[1], "--tls-ca", ca.trust]
    guarded = ["--transport", "ws", "--token-file", tokens, *ca.issue("hop")]
    parties = [server, launcher.hop(1, port, launcher.port, *guarded, *next_one)]
    parties.append(launcher.client(*_client(launcher, port, ca)))
    wait_for(server, "round 2/")
    yield port
    folder = launcher.folder / "server/r"
    wait_for(server, f"round {KEPT + 1}/")
    until = time.monotonic() + TIMEOUT_S
    while not any(round_of(path) > KEPT for path in checkpoint_paths(folder)):
        assert time.monotonic() < until, server.out
        server.process.join(0.02)
    for party in parties:
        assert party.process.is_alive(), party.err
        assert "Traceback" not in party.out + party.err
        party.process.kill()
    assert not re.search("is back|is away|is lost", server.out), server.out
    whole = simulated(launcher.folder / "whole", **RUN | OVER_HOP, rounds=KEPT + 1)
    for name in ("client_model", "server_model", "hop_1"):
        party = "hop_1" if name == "hop_1" else "server"
        ours, theirs = (
            torch.load(next(run.parents[1].glob(f"{party}/r/models/{name}_{KEPT:03d}.pt")))
            for run in (folder, whole)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def _client(launcher: Launcher, port: int, ca: Certificates) -> list[object]:
    mine = token_file(launcher.folder, f"0 {'t' * 40}", name="mine")
    return ["--server", f"127.0.0.1:{port}", "--token-file", mine, "--tls-ca", ca.trust]


PLACES: Mapping[str, Callable[..., contextlib.AbstractContextManager[int]]] = {
    "server": waiting_server,
    "hop": hop_of_a_run,
}
