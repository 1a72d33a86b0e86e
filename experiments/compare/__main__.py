"""Compare schemes and partitions: run every combination, and write tables and figures.

python -m experiments.compare --schemes central,fl,sl,sflv1,sflv2 --partitions iid,sizes:0.2,0.2,0.6
    --seeds 3 [--over sockets] [--jobs 2] [--out DIR] [run options]

Break it off, and start it again with the same options: runs that are done are not done again, one
that was going on begins again with its first round. ``--out`` gets
``compare.csv`` (a line a run, round and client), ``times.csv``, ``compare.md`` and the figures.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from sfl.cli import run_program

if TYPE_CHECKING:
    from sfl.config import RunConfig


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those of the runs."""
    from experiments.compare.plan import OVER
    from sfl.options import Parser

    parser = Parser(
        prog="python -m experiments.compare",
        description="Run every combination of schemes, partitions and seeds, and compare them.",
        epilog="All other options are those of a run: see python -m experiments.simulate --help.",
    )
    parser.add_argument("--schemes", default="central,fl,sl,sflv1,sflv2", help="with commas")
    parser.add_argument(
        "--partitions", default="iid", help="with commas: iid,sizes:0.2,0.8,shards:2"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, counting on from --seed")
    parser.add_argument("--over", choices=OVER, default=OVER[0], help="one process, or many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--keep-tensors", default="none", help="as a run's; tables need none (default: none)"
    )
    return parser.parse_known_args()


def _refuse_overridden(run: "RunConfig") -> None:
    from sfl.config import RunConfig
    from sfl.errors import ConfigError

    for name, instead in (("scheme", "--schemes"), ("partition", "--partitions"), ("run", "--out")):
        if getattr(run, name) != getattr(RunConfig, name):
            raise ConfigError(f"--{name}: a comparison has many; give {instead}")


def main() -> None:
    from experiments.compare.plan import Study, carry_out, check_all, is_done, names
    from sfl.config import RunConfig
    from sfl.errors import ConfigError
    from sfl.nodes import NodeConfig
    from sfl.options import parse_options

    own, rest = parse()
    if own.seeds < 1 or own.jobs < 1:
        raise ConfigError("--seeds and --jobs: must be at least 1")
    run, node = parse_options(
        rest, RunConfig, NodeConfig, prog="python -m experiments.compare", about=""
    )
    _refuse_overridden(run)
    run = replace(run, keep_tensors=own.keep_tensors)
    node = replace(
        node, out=str(node.out_path.resolve()), data_dir=str(node.data_path.resolve())
    )  # the runs are started in another folder
    seeds = range(run.seed, run.seed + own.seeds)
    study = Study(
        names("--schemes", own.schemes),
        names("--partitions", own.partitions),
        seeds,
        run,
        node,
        own.over,
        own.jobs,
    )
    check_all(study)
    total = len(study.runs) * run.rounds
    done = sum(is_done(study, r) for r in study.runs) * run.rounds
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="round", desc="all runs", disable=None) as bar:

        def on_round(of: RunConfig, line: str) -> None:
            bar.update()
            bar.set_postfix_str(f"{of.run}, {line}")
            if bar.disable:  # not in a terminal
                tqdm.write(f"{of.run}: {line}")
                sys.stdout.flush()

        carry_out(study, on_round)
    from experiments.compare.results import write_results

    for path in write_results(study):
        print(path)


if __name__ == "__main__":
    sys.exit(run_program("compare", main))
