"""Servers, hops and clients that are started to be attacked, and run for nothing else."""

import contextlib
import functools
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.hostile.attempts import Table, try_each
from experiments.hostile.insiders import (
    insiders,
    takes_its_own_place,
    try_insider,
    write_bystander,
)
from experiments.hostile.memory import (
    CLAIMS,
    CUT,
    GREEDY,
    SERVER,
    WISHES,
    try_claim,
    try_greed,
    try_own_place,
    try_wish,
)
from experiments.hostile.strangers import shows, tls_to_plain_text
from experiments.hostile.target import Target, target_of
from experiments.hostile.upgrades import FRAMES, try_frames
from experiments.support.processes import ROOT, running
from experiments.support.small_ca import SmallCA
from sfl.archive.run_folder import create_run_folder
from sfl.transport.listener import listen

REFUSED_BYTES = 32 * 2**20  # by which a server may grow when it refuses a claim
CLIENT_BYTES = 400 * 2**20  # by which a client may, which imports its libraries meanwhile


@contextlib.contextmanager
def lone_server(
    out: Path, name: str, options: list[str], own_data: Path | None = None, *, hop: bool = False
) -> Iterator[str]:
    """Run a server that waits for client 0, and give its address, or that of a hop before it."""
    run = ["--clients", "1", "--model", "mlp", "--partition", "own", "--batch-size", "4"]
    run += ["--run", name, "--rounds", "1", "--out", str(out), *options]
    over_hop = ["--topology", "multi-hop", "--cut", "3,5"] if hop else []
    with running([*run, *over_hop]) as processes:
        threading.Thread(target=lambda: list(processes.lines()), daemon=True).start()
        address = processes.address
        if hop:
            address = processes.start_hop(1, address, ["--transport", "ws", "--out", str(out)])
        if own_data is not None:
            bystander = ["--client-id", "1", "--data-dir", str(own_data), "--out", str(out)]
            processes.start_client("client_1", address, bystander)
        yield address


def insider(out: Path, *, hop: bool = False) -> Table:
    """Let one of two clients do harm over WebSocket, to a server or to a hop before it.

    Each time it registers anew with a server that goes on.
    """
    own_data, options = write_bystander(out / "bystander"), ["--clients", "2", "--transport", "ws"]
    with lone_server(out, "insider", options, own_data, hop=hop) as address:
        target = target_of(f"ws://{address}", tls=False)
        attempts = {n: functools.partial(try_insider, target, h) for n, h in insiders().items()}
        attempts |= {f"frames: {n}": functools.partial(try_frames, target, n) for n in FRAMES}
        attempts["its own place, 200 times"] = functools.partial(takes_its_own_place, target)
        attempts["TLS to a plain port"] = functools.partial(tls_to_plain_text, target)
        return try_each(attempts)


def uninvited(out: Path, ca: SmallCA) -> Table:
    """Come to a server that wants clients' certificates without one, and with a wrong one."""
    shown = {
        "no certificate": [],
        "an expired certificate": ca.issue("expired", days=0),
        "a foreign certificate": SmallCA(ca.folder / "foreign").issue("client"),
    }
    with lone_server(
        out, "invited", ["--tls-client-ca", str(ca.cert), *ca.issue("other")]
    ) as address:
        target = target_of(address, tls=True)
        return try_each({n: functools.partial(shows, target, own) for n, own in shown.items()})


@contextlib.contextmanager
def measured(out: Path, options: list[str], *, hop: bool = False) -> Iterator[tuple[Target, int]]:
    """Run a server, and give it, or a hop before it, as a target, with its process."""
    own = ["--peer-timeout", "20", "--out", str(create_run_folder(out, ""))]
    over_hop = ["--topology", "multi-hop", "--cut", "1,3"] if hop else []
    with running([*options, *over_hop, *own]) as processes:
        threading.Thread(target=lambda: list(processes.lines()), daemon=True).start()
        address, process = processes.address, processes.server
        if hop:
            address = processes.start_hop(1, address, own)
            process = processes.clients[-1]
        yield target_of(address, tls=False), process.pid


def greedy(out: Path, *, hop: bool = False) -> int:
    """Take the memory of servers and of clients; print it, and return how many gave too much.

    ``hop``: of a hop before the server, where there is a cut.
    """
    print(f"\n{'who takes memory':50s} {'grown by':>9s} {'bound':>9s}  the answer", flush=True)
    num_over = 0

    def row(name: str, bound: int, grown: int, answer: str) -> None:
        nonlocal num_over
        num_over += grown > bound
        sizes = f"{grown / 2**20:5.0f} MiB {bound / 2**20:5.0f} MiB"
        print(f"{name:50.50s} {sizes}  {answer:.110}", flush=True)

    for name, greed in GREEDY.items():
        if not hop or _serves_hops(greed.server):
            with measured(out, greed.server, hop=hop) as (target, process):
                row(name, greed.bound_bytes, *try_greed(target, process, greed))
    with measured(out, [*SERVER, *CUT], hop=hop) as (target, process):
        row("its own place, 200 times", REFUSED_BYTES, *try_own_place(target, process))
    for name, (options, claim) in CLAIMS.items():
        if not hop or _serves_hops(options):
            with measured(out, options, hop=hop) as (target, process):
                row(name, REFUSED_BYTES, *try_claim(target, claim, process))
    for name, wish in WISHES.items() if not hop else ():
        row(f"a server: {name}", CLIENT_BYTES, *_greedy_server(out, wish))
    return num_over


def _serves_hops(options: Sequence[str]) -> bool:
    return "--cut" in options and "balanced" not in options


def _greedy_server(out: Path, wish: Mapping[str, object]) -> tuple[int, str]:
    """Let a client come to a server that names too much."""
    folder = create_run_folder(out, "")
    with listen("127.0.0.1", 0) as listener:
        options = ["--server", listener.address, "--out", str(folder), "--memory-limit", "1gb"]
        command = [sys.executable, "run_client.py", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, **quiet) as client:
            try:
                return try_wish(listener, wish, client.pid)
            finally:
                client.kill()
