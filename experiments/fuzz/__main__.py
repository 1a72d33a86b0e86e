"""Throw mutated frames, files, JSON and handshakes at whatever reads them.

python -m experiments.fuzz [--frames N] [--flips N] [--files N] [--texts N] [--handshakes N]
    [--seed K]

Each case is drawn from (seed, kind, number) alone, so that one that fails can be had again. What
may come out is a message or a tensor as expected, or one of the project's own errors; nothing may
hang, write a file, or take much memory. A frame with one flipped bit is damaged, and nothing else.
Exit code 0 if all is so, else 1.
"""

import sys
import time
from argparse import Namespace

from sfl.errors import shortened
from sfl.options import Parser
from sfl.program import run_program

# How many of each kind, if not said otherwise.
KINDS = {
    "frames": 1_000_000, "flips": 100_000, "files": 100_000, "texts": 20_000, "handshakes": 100_000,
}  # fmt: skip


def main() -> int:
    options = parse()
    from experiments.fuzz.workers import fuzz

    started = time.perf_counter()
    counts = {kind: getattr(options, kind) for kind in KINDS}
    reports = fuzz(counts, options.seed, options.workers)
    for kind, report in reports.items():
        total = sum(report.outcomes.values())
        print(f"{total} mutated {kind}, seed {options.seed}:")
        for outcome, count in report.outcomes.most_common():
            print(f"  {count:9d}  {outcome}")
        print(
            f"  slowest {report.slowest_s * 1000:.0f} ms, memory beyond the warm-up"
            f" {report.grown_bytes / 2**20:.1f} MiB, {len(report.failures)} failures"
        )
        for failure in report.failures[:20]:
            print(f"  {shortened(failure, 200)}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if any(report.failures for report in reports.values()) else 0


def parse() -> Namespace:
    parser = Parser(prog="python -m experiments.fuzz", description=__doc__.partition("\n")[0])
    for kind, count in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"(default: {count:,})")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("fuzz", main))
