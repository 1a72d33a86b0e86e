"""Compare schemes, partitions and topologies: run every combination; write tables and figures.

python -m experiments.compare --schemes central,fl,sl,sflv1,sflv2 --partitions iid,sizes:0.2,0.2,0.6
    --seeds 3 [--over sockets] [--jobs 2] [--out DIR] [run options]
python -m experiments.compare --schemes fl,sl,sflv1 --cuts 3 3,9 3,6,9 --model lenet5
python -m experiments.compare --schemes sl --topologies vanilla,alternating --cuts 3 --model lenet5

A topology is run with the cuts whose number fits it, a scheme in which nothing crosses a cut once.
Break it off, and start it again with the same options: runs that are done are not done again, one
that was going on begins again with its first round. ``--out`` gets
``compare.csv`` (a line a run, round and client), ``times.csv``, ``compare.md`` and the figures.
"""

import sys
from argparse import Namespace
from dataclasses import replace

from sfl.cli import run_program
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.options import Parser, parse_options

OVER = ("simulation", "sockets")
# Options of a run that a comparison has many values of, and where they stand.
AXES = {"scheme": "schemes", "partition": "partitions", "topology": "topologies", "cut": "cuts"}


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those of the runs."""
    parser = Parser(
        prog="python -m experiments.compare",
        description="Run every combination of schemes, partitions, topologies, cuts and seeds, and"
        " compare them.",
        epilog="All other options are those of a run: see python -m experiments.simulate --help.",
    )
    parser.add_argument("--schemes", default="central,fl,sl,sflv1,sflv2", help="with commas")
    parser.add_argument(
        "--partitions", default="iid", help="with commas: iid,sizes:0.2,0.8,shards:2"
    )
    parser.add_argument(
        "--topologies", default="", help="with commas; if not given, what fits each of --cuts"
    )
    parser.add_argument(
        "--cuts", nargs="+", default=[], metavar="CUT[,CUT...]", help="with spaces: 3 3,9 3,6,9"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, counting on from --seed")
    parser.add_argument("--over", choices=OVER, default=OVER[0], help="one process, or many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--keep-tensors", default="none", help="as a run's; tables need none (default: none)"
    )
    return parser.parse_known_args()


def _refuse_overridden(run: RunConfig, own: Namespace) -> None:
    for name, instead in AXES.items():
        if getattr(own, instead) and getattr(run, name) != getattr(RunConfig, name):
            raise ConfigError(f"--{name}: a comparison has many; give --{instead}")
    if run.run:
        raise ConfigError("--run: a comparison has many; give --out")


def main() -> None:
    own, rest = parse()
    if own.seeds < 1 or own.jobs < 1:
        raise ConfigError("--seeds and --jobs: must be at least 1")
    run, node = parse_options(
        rest, RunConfig, NodeConfig, prog="python -m experiments.compare", about=""
    )
    _refuse_overridden(run, own)
    from tqdm import tqdm

    from experiments.compare.figures import draw_all
    from experiments.compare.plan import carry_out, check_all, is_done
    from experiments.compare.results import read_study, write_tables
    from experiments.compare.study import Study, distinct, left_out, names

    # The runs are started in another folder.
    paths = {"out": str(node.out_path.resolve()), "data_dir": str(node.data_path.resolve())}
    study = Study(
        schemes=names("--schemes", own.schemes),
        partitions=names("--partitions", own.partitions),
        seeds=range(run.seed, run.seed + own.seeds),
        run=replace(run, keep_tensors=own.keep_tensors),
        node=replace(node, **paths),
        over=own.over,
        jobs=own.jobs,
        topologies=names("--topologies", own.topologies) if own.topologies else (),
        cuts=distinct("--cuts", own.cuts),
    )
    for line in left_out(study):
        print(line, flush=True)
    check_all(study)
    total = len(study.runs) * run.rounds
    done = sum(is_done(study, r) for r in study.runs) * run.rounds
    with tqdm(total=total, initial=done, unit="round", desc="all runs", disable=None) as bar:

        def on_round(of: RunConfig, line: str) -> None:
            bar.update()
            bar.set_postfix_str(f"{of.run}, {line}")
            if bar.disable:  # not in a terminal
                tqdm.write(f"{of.run}: {line}")
                sys.stdout.flush()

        carry_out(study, on_round)
    lines = read_study(study)
    for path in write_tables(study, lines) + draw_all(study, lines):
        print(path)


if __name__ == "__main__":
    sys.exit(run_program("compare", main))
