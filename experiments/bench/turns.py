"""All contenders of a row train in turn, each block behind one of the bare arithmetic."""

import contextlib
import dataclasses
import importlib.util
import itertools
from argparse import Namespace
from pathlib import Path

from experiments.bench.contenders import BLOCK_ROUNDS, Contender, Peer, Sample, Sfl, mean_seconds
from experiments.bench.report import Result
from experiments.bench.rows import FEW_DIGITS, Row
from experiments.bench.transports import TRANSPORTS
from sfl.values import LinkShape

ALONE = "arithmetic alone"
PEERS = {  # title -> module of experiments.bench.peers, and the package that it needs
    "bare TCP, nothing checked": ("sockets", "torch"),
    "mpi4py, pickled": ("mpi", "mpi4py"),
    "torch RPC, dist. autograd": ("rpc", "torch"),
    "WebSocket, base64 JSON": ("websocket", "websockets"),
    "Ray actor": ("ray_actor", "ray"),
}
MODEL = "arithmetic + 2 delays + bytes / rate"
ARCHIVES = {"SFL, archive on": "all", "SFL, archive off": "none"}


def run_row(row: Row, options: Namespace, folder: Path) -> list[Result]:
    """Let all contenders of a row train in turn, and return what each took."""
    with contextlib.ExitStack() as stack:
        alone, *others = start(stack, row, options, folder)
        samples: dict[str, list[Sample]] = {c.title: [] for c in (alone, *others)}
        ratios: dict[str, list[float]] = {c.title: [] for c in (alone, *others)}
        for block, contender in itertools.product(range(options.blocks + 1), others):
            beside, found = alone.block(options.steps), contender.block(options.steps)
            if block:
                samples[ALONE] += beside
                samples[contender.title] += found
                ratios[contender.title].append(mean_seconds(found) / mean_seconds(beside))
        results = [
            Result(row, c.title, samples[c.title], ratios[c.title], c.peak_bytes())
            for c in (alone, *others)
        ]
        return modelled(*results, LinkShape.parse(options.link)) if options.link else results


def modelled(alone: Result, ours: Result, link: LinkShape) -> list[Result]:
    """Return what a step over a link should take at least, and what it took."""
    num_bytes = ours.counted("num_bytes") or 0.0
    seconds = alone.ms / 1e3 + 2 * link.delay_s + num_bytes / link.bytes_per_s
    model = Result(ours.row, MODEL, [Sample(seconds, alone.cpu_ms / 1e3)], [], 0)
    return [model, dataclasses.replace(ours, ratios=[ours.ms / model.ms])]


def start(
    stack: contextlib.ExitStack, row: Row, options: Namespace, folder: Path
) -> list[Contender]:
    """Start all contenders of a row; who lacks a package is named and left out."""
    rounds = (options.blocks + 1) * (BLOCK_ROUNDS + 1) + 3
    contenders: list[Contender] = [Peer(stack, ALONE, "alone", row, folder)]
    server, client = ["--rounds", str(rounds)], ["--allow-import", FEW_DIGITS]
    if options.link:
        link, title = ["--link", options.link], f"SFL over {options.link}"
        return [*contenders, Sfl(stack, title, row, folder, server, [*client, *link])]
    for title, keep in ARCHIVES.items():
        own = [*server, "--keep-tensors", keep]
        contenders.append(Sfl(stack, title, row, folder, own, client))
    if not row.has_peers:
        return contenders
    for title, (package, over) in TRANSPORTS.items():
        if is_there(package, title, row):
            own = [*server, "--keep-tensors", "none"]
            contenders.append(Sfl(stack, title, row, folder, own, client, over=over))
    for title, (module, package) in PEERS.items():
        if is_there(package, title, row):
            contenders.append(Peer(stack, title, module, row, folder))
    return contenders


def is_there(package: str, title: str, row: Row) -> bool:
    """Return whether the package is there that a contender needs; name it if it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{row.name}: without {title}: there is no {package}; pip install {package}")
    return found
