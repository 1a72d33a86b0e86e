"""How long each scheme takes over real sockets, on this machine's link and on slower ones.

python -m experiments.measure.run_times [--schemes sl,sflv1,sflv2] [--delays-ms 0,20] [run options]

One run a scheme and delay, a server and the clients as processes of their own; each client's link
delays what it carries by so much in each direction. Prints a Markdown table as it goes.
"""

import contextlib
import csv
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.support.processes import running
from experiments.support.slow_link import slow_link
from sfl.errors import ConfigError
from sfl.options import Parser
from sfl.program import run_program

COLUMNS = ("delay", "scheme", "seconds a round", "times as fast as the first", "test accuracy")


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those that it passes on to the server."""
    parser = Parser(
        prog="python -m experiments.measure.run_times", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--schemes", default="sl,sflv1,sflv2", help="default: sl,sflv1,sflv2")
    parser.add_argument(
        "--delays-ms", default="0", help="one-way delays, each its own runs (default: 0)"
    )
    parser.add_argument("--clients", type=int, default=3, help="number of clients (default: 3)")
    parser.add_argument("--data-dir", default="", help="as the programs'")
    return parser.parse_known_args()


def numbers(text: str) -> list[float]:
    """Return the numbers of a list with commas.

    Raises:
        ConfigError: one of them is no number, or below 0.
    """
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        values = [-1.0]
    if min(values) < 0:
        raise ConfigError(f"--delays-ms {text}: give milliseconds, 0 or more, with commas between")
    return values


@contextlib.contextmanager
def slowed(address: str, num_clients: int, delay_s: float) -> Iterator[list[str]]:
    """Offer each client an address that leads to the server, over a slow link if it is one."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as links:
        if not delay_s:
            yield [address] * num_clients
            return
        slow = (slow_link(host, int(port), delay_s=delay_s) for _ in range(num_clients))
        yield [links.enter_context(link) for link in slow]


def run_once(
    scheme: str, delay_s: float, options: Namespace, run_options: Sequence[str], out: Path
) -> dict[str, str]:
    """Run one scheme and return the last line of its ``rounds.csv``."""
    data = ["--data-dir", options.data_dir] if options.data_dir else []
    server = ["--clients", str(options.clients), "--scheme", scheme, "--out", str(out)]
    server += ["--run", "timed", *run_options]
    with (
        running(server) as processes,
        slowed(processes.address, options.clients, delay_s) as addresses,
    ):
        processes.start_clients(addresses, [*data, "--out", str(out)])
        for _ in processes.lines():
            pass
        processes.wait()
    text = (out / "server/timed/rounds.csv").read_text()
    return list(csv.DictReader(text.splitlines()))[-1]


def main() -> None:
    options, run_options = parse()
    delays_ms = numbers(options.delays_ms)
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + " --- |" * len(COLUMNS))
    for delay_ms in delays_ms:
        first_s = 0.0
        for scheme in options.schemes.split(","):
            with TemporaryDirectory(prefix="sfl-") as folder:
                row = run_once(scheme, delay_ms / 1000, options, run_options, Path(folder))
            seconds = float(row["seconds"])
            first_s = first_s or seconds
            accuracy = f"{float(row['test_acc']):.4f}"
            cells = (f"{delay_ms:g} ms", scheme, f"{seconds:.1f}", f"{first_s / seconds:.2f}")
            print(f"| {' | '.join((*cells, accuracy))} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_program("run_times", main))
