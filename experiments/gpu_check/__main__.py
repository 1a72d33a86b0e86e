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
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sfl.errors import ConfigError, SflError, shortened
from sfl.options import Parser
from sfl.program import run_program

RESERVE_S = 60  # what is begun so long before the end may be over in time


class Table:
    """The table as it grows: a line is printed as soon as it is known."""

    def __init__(self, minutes: float) -> None:
        self._ends_at = time.monotonic() + 60 * minutes
        self.wrong, self.left_out, self.done = 0, 0, 0
        print("| check | what was seen | | seconds |\n| --- | --- | --- | ---: |", flush=True)

    def add(self, title: str, run: Callable[[], tuple[str, bool]]) -> None:
        """Do one check and print its line; leave it out if the time is up."""
        if time.monotonic() > self._ends_at - RESERVE_S:
            self.left_out += 1
            print(f"| {title} | left out: --minutes are up | | |", flush=True)
            return
        began_at = time.monotonic()
        try:
            seen, is_right = run()
        except (SflError, OSError, ValueError, RuntimeError) as error:  # torch's are RuntimeErrors
            seen, is_right = shortened(f"{type(error).__name__}: {error}", 300), False
        self.done += 1
        self.wrong += not is_right
        seconds = time.monotonic() - began_at
        state = "ok" if is_right else "NOT OK"
        print(f"| {title} | {' '.join(seen.split())} | {state} | {seconds:.1f} |", flush=True)

    def closing_line(self) -> str:
        line = f"{self.done} checks and measurements, {self.wrong} NOT OK"
        return f"{line}, {self.left_out} left out" if self.left_out else line


def main() -> int:
    options = parse()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise ConfigError(f"--device {options.device}: give cpu, cuda or cuda:N")
    from experiments.gpu_check.checks import checks
    from experiments.gpu_check.speed import BLOCKS, STEPS, measurements
    from sfl.environment import describe, set_up_torch
    from sfl.nodes import NodeConfig

    is_dry = options.device == "cpu"
    device = set_up_torch(NodeConfig(device=options.device))
    blocks, steps = (1, 2) if is_dry else (BLOCKS, STEPS)
    about = describe(device, [])
    print(", ".join(f"{name} {value}" for name, value in about["fingerprint"].items()))
    with TemporaryDirectory(prefix="sfl-gpu-") as name:
        folder = Path(name)
        os.environ["SFL_CACHE_DIR"] = str(folder / "cache")  # also of the processes started here
        table = Table(options.minutes)
        for check in checks(options.device, folder, is_dry=is_dry):
            table.add(check.title, check.run)
        for number, row in enumerate(measurements(options.device, is_dry=is_dry)):
            own = folder / f"speed_{number}"
            table.add(row.title, lambda row=row, own=own: (row.take(own, blocks, steps), True))
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
