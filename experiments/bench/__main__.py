"""How fast a step is: ours, the bare arithmetic, and other ways to train over a cut, in turn.

python -m experiments.bench [--rows mlp-128-1,...] [--blocks 7] [--out FOLDER] [--profile]

A row is a model, a batch size and a number of clients. All contenders of a row live at the same
time; blocks of steps alternate between them, each behind one of the bare arithmetic that it is
compared with, so that a machine whose speed drifts does not decide; the first of each does not
count. Writes bench.csv, bench.md and bench.png. ``--profile`` shows
where the time of our own steps goes, ``--link 100mbit,50ms`` what a slow link makes of them.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from experiments.bench.contenders import BLOCK_ROUNDS, Contender, Peer, Row, Sample, Sfl
from experiments.bench.few_digits import FEW_DIGITS
from experiments.bench.report import Result, phases_table, table, write_all
from sfl.cli import run_program
from sfl.errors import ConfigError
from sfl.registry import unknown_name
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
LARGE = ("--image-size", "64", "--dataset", FEW_DIGITS)
ROWS = [
    *(Row(model, batch, clients)
      for model in ("mlp", "lenet5") for clients in (1, 3) for batch in (32, 128)),
    Row("resnet18", 32, 1, LARGE, has_peers=False, epochs=1),
]  # fmt: skip


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


def mean_seconds(samples: Sequence[Sample]) -> float:
    return fmean(sample.seconds for sample in samples)


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
    client = ["--allow-import", FEW_DIGITS]
    if options.link:
        link, title = ["--link", options.link], f"SFL over {options.link}"
        server = ["--rounds", str(rounds)]
        return [*contenders, Sfl(stack, title, row, folder, server, [*client, *link])]
    for title, keep in ARCHIVES.items():
        server = ["--rounds", str(rounds), "--keep-tensors", keep]
        contenders.append(Sfl(stack, title, row, folder, server, client))
    for title, (module, package) in PEERS.items() if row.has_peers else ():
        if importlib.util.find_spec(package):
            contenders.append(Peer(stack, title, module, row, folder))
        else:
            print(f"{row.name}: without {title}: there is no {package}; pip install {package}")
    return contenders


def main() -> None:
    options = parse()
    rows = {row.name: row for row in ROWS}
    chosen = options.rows.split(",") if options.rows else list(rows)
    for name in chosen:
        if name not in rows:
            raise unknown_name("row", name, rows)
    if min(options.blocks, options.steps) < 1:
        raise ConfigError("--blocks and --steps: give at least 1")
    LinkShape.parse(options.link)
    results: list[list[Result]] = []
    # Removed at the end alone: a file system may be slow to create files where many were removed.
    with TemporaryDirectory(prefix="sfl-") as folder:
        for name in chosen:
            (own := Path(folder) / name).mkdir()
            found = run_row(rows[name], options, own)
            print(table(found), flush=True)
            if options.profile:
                print(phases_table(found), flush=True)
            results.append(found)
    for path in write_all(Path(options.out), results):
        print(path)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.bench", description=__doc__.partition("\n")[0])
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--rows", default="", help=f"which, of {names} (default: all)")
    parser.add_argument("--blocks", type=int, default=7, help="of each contender (default: 7)")
    parser.add_argument("--steps", type=int, default=60, help="in a peer's block (default: 60)")
    parser.add_argument("--out", default="bench", help="folder of what is written")
    parser.add_argument(
        "--link", default="", help="our own runs over such a link alone, beside what it must take"
    )
    parser.add_argument("--profile", action="store_true", help="show where our time goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("bench", main))
