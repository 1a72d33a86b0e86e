"""A whole run on this machine: one server and three clients as processes, report, replay.

python -m experiments.demo [--rounds N] [--out DIR]
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.support.processes import running
from sfl.errors import ConfigError, RunError
from sfl.options import Parser
from sfl.program import run_program

NUM_CLIENTS = 3
OPTIONS = ["--model", "lenet5", "--dataset", "mnist-5k", "--batch-size", "32", "--lr", "0.002"]
SHOWN = ("round", "train_loss", "val_loss", "val_acc", "test_acc", "bytes_up", "seconds")


def run_demo(rounds: int, out: Path, new_bar: Callable[..., Any]) -> Path:
    """Run server and clients, follow them with a bar, and return the run's folder."""
    print(f"one server and {NUM_CLIENTS} clients on this machine, {rounds} rounds of SplitFed V1")
    options = [*OPTIONS, "--clients", str(NUM_CLIENTS), "--rounds", str(rounds)]
    common = ["--out", str(out)]
    with running([*options, *common]) as processes:
        processes.start_clients([processes.address] * NUM_CLIENTS, common)
        with new_bar(total=rounds, unit="round", desc="training", disable=None) as bar:
            for line in processes.lines():
                if line.startswith("round "):
                    bar.update()
                    bar.set_postfix_str(line.partition(": ")[2])
                    if bar.disable:  # not in a terminal
                        print(line, flush=True)
        processes.wait()
        return out / "server" / processes.run


def print_table(run_dir: Path) -> dict[str, str]:
    """Print the table of rounds and return the last one."""
    with open(run_dir / "rounds.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    print(" ".join(f"{name:>10}" for name in SHOWN))
    for row in rows:
        shown = row | {"round": str(int(row["round"]) + 1)}  # as in the lines above it
        cells = [c if not c or c.isdigit() else f"{float(c):.4f}" for c in map(shown.get, SHOWN)]
        print(" ".join(f"{cell:>10}" for cell in cells))
    return rows[-1]


def main() -> None:
    parser = Parser(prog="python -m experiments.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="global rounds (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("shared_files"), help="as the programs'")
    options = parser.parse_args()
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: must be at least 1")
    from tqdm import tqdm

    from sfl.interactive.run import open_run
    from sfl.reports.report import write_report
    from sfl.runtime.recorded_run import load
    from sfl.runtime.replay import check

    run_dir = run_demo(options.rounds, options.out.resolve(), tqdm)
    last = print_table(run_dir)
    (report_page,) = write_report([open_run(run_dir)], run_dir / "report.html")
    print("replaying the server's part from its files ...")
    report = check(load(run_dir))
    print(f"logs and tensors  {run_dir}")
    print(f"the clients' logs {run_dir.parent.parent / 'client' / run_dir.name}")
    print(f"report            {report_page}")
    for finding in report.findings:
        print(finding)
    print(f"test accuracy {float(last['test_acc']):.4f}")
    print(report.summary)
    if report.findings:
        raise RunError("the replay check found differences")


if __name__ == "__main__":
    sys.exit(run_program("demo", main))
