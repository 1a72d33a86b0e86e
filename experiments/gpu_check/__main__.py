"""Check on a GPU that results are exact, and measure how long a step takes there.

python -m experiments.gpu_check [--device cuda] [--minutes 8]

It needs torch, torchvision, numpy and tqdm, no network and no data set. Server and clients are
compared with a simulation on the same devices, replayed, killed and gone on with; steps are
measured in turns with a plain loop in one process. With --device cpu it is a dry run: the same code
at a small size. Exit code 0 if everything is as it should be, else 1.
"""

import os
import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.gpu_check.worker import Result, Worker
from sfl.errors import ConfigError, RunError
from sfl.options import Parser
from sfl.program import run_program

ROWS = "experiments.gpu_check.rows:rows"
LIMIT_S = 150.0  # of a row; a run of processes ends earlier, see exact_runs.LIMIT_S
RESERVE_S = 60  # what is begun so long before the end may be over in time


class Table:
    """The table as it grows: a line is printed as soon as it is known."""

    def __init__(self, minutes: float) -> None:
        self._ends_at = time.monotonic() + 60 * minutes
        self.wrong, self.left_out, self.done = 0, 0, 0
        print("| check | what was seen | | seconds |\n| --- | --- | --- | ---: |", flush=True)

    def fill(self, worker: Worker, limit_s: float = LIMIT_S) -> None:
        """Do all rows and print each; leave out those that begin too late."""
        try:
            while title := worker.next_title(min(LIMIT_S, self._left_s)):
                if self._is_late:
                    worker.leave_out()
                    self._leave_out(title)
                    continue
                self._add(title, worker.do(min(limit_s, self._left_s)))
                if worker.has_ended and self._is_late:
                    self._leave_out("the rest")
                    break
        except RunError as error:
            self._add("what was to follow", Result(str(error), is_right=False, seconds=0.0))

    @property
    def _is_late(self) -> bool:
        return self._left_s < RESERVE_S

    def _leave_out(self, title: str) -> None:
        self.left_out += 1
        print(f"| {title} | left out: --minutes are up | | |", flush=True)

    @property
    def _left_s(self) -> float:
        return max(self._ends_at - time.monotonic(), 1.0)

    def _add(self, title: str, result: Result) -> None:
        self.done += 1
        self.wrong += not result.is_right
        state = "ok" if result.is_right else "NOT OK"
        print(f"| {title} | {result.seen} | {state} | {result.seconds:.1f} |", flush=True)

    def closing_line(self) -> str:
        line = f"{self.done} checks and measurements, {self.wrong} NOT OK"
        return f"{line}, {self.left_out} left out" if self.left_out else line


def main() -> int:
    options = parse()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise ConfigError(f"--device {options.device}: give cpu, cuda or cuda:N")
    table = Table(options.minutes)
    # What a killed process leaves may still be written while the folder is removed.
    with TemporaryDirectory(prefix="sfl-gpu-", ignore_cleanup_errors=True) as name:
        os.environ["SFL_CACHE_DIR"] = str(Path(name) / "cache")  # also of the processes started
        with Worker(ROWS, options.device, name) as worker:
            table.fill(worker)
    print(table.closing_line())
    return 1 if table.wrong else 0


def parse() -> Namespace:
    parser = Parser(prog="python -m experiments.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu for a dry run (default: cuda)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="what would begin later is left out (default: 8)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("gpu_check", main))
