"""How a server's rounds and memory grow with the number of its clients.

python -m experiments.measure.many_clients [--clients 50,500] [--participation 0.1,1] [--hosts 10]

Each run has its clients on so many hosts: processes of this machine, each with as many of them
(--client-ids). Prints a Markdown table: seconds of a round, and of one for each client that took
part; the server's memory when all had come, and at most.
"""

import csv
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from experiments.support.process_tree import Tree
from experiments.support.processes import running
from sfl.errors import ConfigError
from sfl.options import Parser
from sfl.program import run_program

COLUMNS = ("clients", "participation", "rounds", "s a round", "ms a client", "MiB at most")


def main() -> None:
    options, rest = parse()
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + " ---: |" * len(COLUMNS))
    for share in numbers(options.participation, "--participation"):
        for count in map(int, numbers(options.clients, "--clients")):
            with TemporaryDirectory(prefix="sfl-") as folder:
                cells = run_once(count, share, options, rest, Path(folder))
            print(f"| {' | '.join(cells)} |", flush=True)


def run_once(
    count: int, share: float, options: Namespace, rest: Sequence[str], out: Path
) -> tuple[str, ...]:
    """Run with so many clients; return the cells of its line."""
    server = ["--clients", str(count), "--participation", str(share), "--run", "many"]
    server += ["--model", "mlp", "--rounds", str(options.rounds), "--out", str(out), *rest]
    with running(server) as processes:
        for host in range(options.hosts):
            first, last = (count * k // options.hosts for k in (host, host + 1))
            if first < last:
                ids = ["--client-ids", f"{first}-{last - 1}", "--out", str(out)]
                processes.start_client(f"host_{host}", processes.address, ids)
        peak_bytes = 0
        for line in processes.lines():
            if re.match(r"round \d+/", line):
                peak_bytes = Tree(processes.server.pid).peak_bytes()
        processes.wait()
    lines = list(csv.DictReader((out / "server/many/rounds.csv").read_text().splitlines()))
    # The first round has everybody's first step, which takes long.
    seconds = median(float(line["seconds"]) for line in lines[1:])
    took_part = median(len(line["took_part"].split(";")) for line in lines[1:])
    return (
        str(count), f"{share:g}", str(len(lines)), f"{seconds:.2f}",
        f"{seconds / took_part * 1e3:.1f}", f"{peak_bytes / 2**20:.0f}",
    )  # fmt: skip


def numbers(text: str, option: str) -> list[float]:
    """Return the numbers of a list with commas.

    Raises:
        ConfigError: one of them is no number above 0.
    """
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        values = [0.0]
    if min(values) <= 0:
        raise ConfigError(f"{option} {text}: give numbers above 0, with commas between")
    return values


def parse() -> tuple[Namespace, list[str]]:
    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.measure.many_clients", description=about)
    parser.add_argument("--clients", default="50,500", help="default: 50,500")
    parser.add_argument("--participation", default="0.1,1", help="default: 0.1,1")
    parser.add_argument("--hosts", type=int, default=10, help="processes of clients (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="of each run (default: 5)")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(run_program("many_clients", main))
