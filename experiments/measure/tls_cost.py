"""What token and TLS cost: rounds under TLS, and rounds in the clear, in turn.

python -m experiments.measure.tls_cost [--rounds N] [run options]

Two runs over real sockets live at the same time, and while one trains the processes of the other
are stopped (SIGSTOP); after every few rounds they change places. The first round after a change
does not count. Prints the median seconds of a round of both, and their ratio.
"""

import contextlib
import csv
import os
import signal
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from experiments.support.processes import Processes, running
from experiments.support.small_ca import SmallCA
from sfl.auth import main as auth
from sfl.errors import RunError
from sfl.options import Parser
from sfl.program import run_program

BLOCK = 4  # rounds of one, rounds of the other, ...; the first of each does not count
DEFAULTS = ["--model", "lenet5", "--batch-size", "128"]


@dataclass
class Contender:
    """One run, and which of its rounds count."""

    title: str
    processes: Processes
    folder: Path

    def signal(self, number: int) -> None:
        for process in [self.processes.server, *self.processes.clients]:
            if process.poll() is None:
                os.kill(process.pid, number)

    def seconds(self) -> list[float]:
        path = self.folder / "rounds.csv"
        if not path.exists():
            return []
        with open(path, newline="") as stream:
            return [float(row["seconds"]) for row in csv.DictReader(stream) if row["seconds"]]

    def run_rounds(self, count: int) -> None:
        """Let it go on until so many more rounds are done.

        Raises:
            RunError: it has ended by itself.
        """
        wanted = len(self.seconds()) + count
        self.signal(signal.SIGCONT)
        while len(self.seconds()) < wanted:
            if self.processes.server.poll() not in (None, 0):
                self.processes.wait()
            if self.processes.server.poll() == 0:
                return
            time.sleep(0.01)
        self.signal(signal.SIGSTOP)


def main() -> None:
    options, rest = parse()
    with TemporaryDirectory(prefix="sfl-") as folder, contextlib.ExitStack() as stack:
        out = Path(folder)
        contenders = [start(stack, out, title, options, rest) for title in ("clear", "tls")]
        for _ in range(options.rounds // BLOCK):
            for contender in contenders:
                contender.run_rounds(BLOCK)
        # The first round of a block was stopped half-way.
        found = {
            c.title: [s for i, s in enumerate(c.seconds()[1:]) if i % BLOCK] for c in contenders
        }
        for contender in contenders:
            contender.signal(signal.SIGCONT)
        for contender in contenders:
            contender.processes.kill()
    if not all(found.values()):
        raise RunError(f"--rounds {options.rounds} are too few: {BLOCK} at least")
    print("| a round | rounds | median seconds | ratio |")
    print("| --- | --- | --- | --- |")
    clear = median(found["clear"])
    for title, name in (("clear", "in the clear"), ("tls", "with token and TLS")):
        middle = median(found[title])
        print(f"| {name} | {len(found[title])} | {middle:.4f} | {middle / clear:.3f} |")


def start(
    stack: contextlib.ExitStack, out: Path, title: str, options: Namespace, rest: list[str]
) -> Contender:
    """Start one of the two runs, and stop it after its first round."""
    server = [*DEFAULTS, "--clients", str(options.clients), "--rounds", str(options.rounds + 2)]
    server += ["--run", title, "--out", str(out), "--keep-tensors", "none", *rest]
    client = ["--out", str(out), "--peer-timeout", "600"]
    if title == "tls":
        ca, token = SmallCA(out / "ca"), out / "token"
        auth(["new-token", str(token)])
        server += ["--token-file", str(token), *ca.issue("server")]
        client += ["--token-file", str(token), "--tls-ca", str(ca.cert)]
    processes = stack.enter_context(running([*server, "--peer-timeout", "600"]))
    processes.start_clients([processes.address] * options.clients, client)
    for line in processes.lines():
        if line.startswith("round "):
            break
    else:
        processes.wait()
    contender = Contender(title, processes, out / "server" / title)
    contender.signal(signal.SIGSTOP)
    return contender


def parse() -> tuple[Namespace, list[str]]:
    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.measure.tls_cost", description=about)
    parser.add_argument("--rounds", type=int, default=40, help="of each kind (default: 40)")
    parser.add_argument("--clients", type=int, default=3, help="of each run (default: 3)")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(run_program("tls_cost", main))
