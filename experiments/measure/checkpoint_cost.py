"""What recovery costs: rounds with checkpoints, syncing and spool, and rounds without, in turn.

python -m experiments.measure.checkpoint_cost [--rounds N] [run options]

One run over real sockets, whose server is this process. In every other block of rounds nothing is
synced, no checkpoint is written and no answer is kept; the tensors are recorded in all. Prints the
median seconds of both kinds of rounds, without the first of each block, and their ratio.
"""

import contextlib
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from experiments.support.processes import ROOT
from sfl.cli import run_program
from sfl.errors import RunError

NUM_CLIENTS = 3
BLOCK = 3  # rounds with, rounds without, ...


@contextlib.contextmanager
def switched_off_in_turn(seconds: dict[bool, list[float]]) -> Iterator[None]:
    """Let every other block of rounds do without what recovery needs, and time them all."""
    from unittest.mock import patch

    from sfl.archive.spool import Spool
    from sfl.archive.writer import ArchiveWriter
    from sfl.runtime.rounds import Rounds

    is_on = True
    whole_round, commit, put, fsync = Rounds._round, ArchiveWriter.commit, Spool.put, os.fsync

    def timed_round(rounds: Rounds, round_index: int) -> dict[str, float]:
        nonlocal is_on
        is_on = round_index // BLOCK % 2 == 0
        started = time.perf_counter()
        figures = whole_round(rounds, round_index)
        if round_index % BLOCK:  # what the block before left to be written ends in its first round
            seconds[is_on].append(time.perf_counter() - started)
        return figures

    def only_if_on(call: Any) -> Any:
        return lambda *given, **named: call(*given, **named) if is_on else None

    with (
        patch.object(Rounds, "_round", timed_round),
        patch.object(ArchiveWriter, "commit", only_if_on(commit)),
        patch.object(Spool, "put", only_if_on(put)),
        patch.object(os, "fsync", only_if_on(fsync)),
    ):
        yield


def parse() -> tuple[Namespace, list[str]]:
    from sfl.options import Parser

    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.measure.checkpoint_cost", description=about)
    parser.add_argument("--rounds", type=int, default=24, help="of both kinds (default: 24)")
    parser.add_argument("--data-dir", default="", help="of clients and server")
    return parser.parse_known_args()


def main() -> None:
    from sfl.config import RunConfig
    from sfl.nodes import ServerNode
    from sfl.options import parse_options
    from sfl.runtime.server import serve

    options, rest = parse()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory(prefix="sfl-") as folder, contextlib.ExitStack() as stack:
        common = ["--out", folder, *(["--data-dir", options.data_dir] if options.data_dir else [])]
        port = _free_port()
        arguments = ["--clients", str(NUM_CLIENTS), "--rounds", str(options.rounds)]
        run, node = parse_options(
            [*arguments, "--port", str(port), *rest, *common],
            RunConfig,
            ServerNode,
            prog="checkpoint_cost",
            about="",
        )
        for k in range(NUM_CLIENTS):
            command = ["run_client.py", "--server", f"127.0.0.1:{port}", "--client-id", str(k)]
            client = subprocess.Popen(
                [sys.executable, *command, *common], cwd=ROOT, stdout=subprocess.DEVNULL
            )
            stack.callback(_end, client)
        with switched_off_in_turn(seconds):
            path = serve(run, node)
        assert (Path(path) / "checkpoints").is_dir()
    if not all(seconds.values()):
        raise RunError(f"--rounds {options.rounds} are too few: {2 * BLOCK} at least")
    with_it, without = (median(seconds[on]) for on in (True, False))
    print("| rounds | median seconds with | without | ratio |")
    print("| --- | --- | --- | --- |")
    counts = f"{len(seconds[True])} + {len(seconds[False])}"
    print(f"| {counts} | {with_it:.4f} | {without:.4f} | {with_it / without:.4f} |")


def _end(client: "subprocess.Popen[bytes]") -> None:
    """Wait for a client that has heard that the run is over; kill one that has not."""
    try:
        client.wait(20)
    except subprocess.TimeoutExpired:
        client.kill()
        client.wait()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(run_program("checkpoint_cost", main))
