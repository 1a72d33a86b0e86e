"""What recovery costs: rounds with checkpoints, syncing and spool, and rounds without, in turn.

python -m experiments.measure.checkpoint_cost [--rounds N] [run options]

One run over real sockets, whose server is this process. In every other block of rounds nothing is
synced, no checkpoint is written and no answer is kept; the tensors are recorded in all. Prints the
median seconds of both kinds of rounds, without the first of each block, and their ratio.
"""

import contextlib
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from experiments.support.processes import ROOT, free_port
from sfl.config import RunConfig
from sfl.errors import RunError
from sfl.nodes import ServerNode
from sfl.options import Parser, parse_options
from sfl.program import run_program

NUM_CLIENTS = 3


def parse() -> tuple[Namespace, list[str]]:
    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.measure.checkpoint_cost", description=about)
    parser.add_argument("--rounds", type=int, default=24, help="of both kinds (default: 24)")
    parser.add_argument("--data-dir", default="", help="of clients and server")
    return parser.parse_known_args()


def main() -> None:
    options, rest = parse()
    from experiments.measure.recovery_off import BLOCK, switched_off_in_turn
    from sfl.runtime.server import serve

    seconds: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory(prefix="sfl-") as folder, contextlib.ExitStack() as stack:
        common = ["--out", folder, *(["--data-dir", options.data_dir] if options.data_dir else [])]
        port = free_port()
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


if __name__ == "__main__":
    sys.exit(run_program("checkpoint_cost", main))
