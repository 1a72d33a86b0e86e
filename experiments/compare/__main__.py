"""Compare schemes, partitions and topologies: run every combination; write tables and figures.

python -m experiments.compare --schemes central,fl,sl,sflv1,sflv2 --partitions iid,sizes:0.2,0.2,0.6
    --seeds 3 [--over sockets] [--jobs 2] [--out DIR] [run options]
python -m experiments.compare --schemes fl,sl,sflv1 --cuts 3 3,9 3,6,9 --model lenet5
python -m experiments.compare --schemes sl --topologies vanilla,alternating --cuts 3 --model lenet5

python -m experiments.compare --schemes sl --sweep lr=0.1,0.01 --sweep batch_size=16,64

A topology is run with the cuts whose number fits it, a scheme in which nothing crosses a cut once.
``--sweep`` takes any option of a run; several make every combination, and all are checked before
the first run. Break it off, and start it again with the same options: runs that are done are not
done again, one that was going on begins again with its first round. Everything lies in ``--out``,
by default a folder of this comparison alone: ``compare.csv`` (a line a run, round and client),
``times.csv``, ``compare.md``, figures, and ``report.html``, which has them side by side.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.compare.values import distinct, names
from experiments.support import quiet_ray
from sfl.config import RunConfig, flag
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.options import Parser, names_of, parse_options
from sfl.program import run_program

OVER = ("simulation", "sockets", "ray")
PROG = "python -m experiments.compare"
# Options of a run that a comparison has many values of, and where they stand.
AXES = {"scheme": "schemes", "partition": "partitions", "topology": "topologies", "cut": "cuts"}
USUAL = {"schemes": "central,fl,sl,sflv1,sflv2", "partitions": "iid"}  # if none are given
NOT_SWEPT = {
    "run": "--out",
    "seed": "--seeds",
    "rounds": "--rounds",
    "keep_tensors": "--keep-tensors",
}


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those of the runs."""
    parser = Parser(
        prog=PROG,
        description="Run every combination of schemes, partitions, topologies, cuts and seeds, and"
        " compare them.",
        epilog="All other options are those of a run: see python -m experiments.simulate --help.",
    )
    parser.add_argument("--schemes", default="", help=f"with commas (default: {USUAL['schemes']})")
    parser.add_argument(
        "--partitions", default="", help="with commas: iid,sizes:0.2,0.8,shards:2 (default: iid)"
    )
    parser.add_argument(
        "--topologies", default="", help="with commas; if not given, what fits each of --cuts"
    )
    parser.add_argument(
        "--cuts", nargs="+", default=[], metavar="CUT[,CUT...]", help="with spaces: 3 3,9 3,6,9"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="OPTION=VALUE,VALUE",
        help="values of any option of a run, as lr=0.1,0.01; several times for every combination;"
        " numbers belong to the name before, as in --partitions; for several cuts, give --cuts",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="how many, counting on from --seed")
    parser.add_argument(
        "--over", choices=OVER, default=OVER[0],
        help="a run is one process, or many; ray: one, placed by Ray on a machine of its cluster",
    )  # fmt: skip
    parser.add_argument(
        "--address", default="local", metavar="ADDRESS",
        help="of the cluster, with --over ray: auto, HOST:PORT, or local for this machine alone",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int,
        help="runs at a time (default: 1; over ray, as many as its CPUs have room for)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-tensors", default="none", help="as a run's; tables need none (default: none)"
    )
    return parser.parse_known_args()


def _refuse_overridden(run: RunConfig, own: Namespace, swept: Sequence[str]) -> None:
    for name in swept:
        if swept.count(name) > 1 or getattr(run, name) != getattr(RunConfig, name):
            raise ConfigError(f"{flag(name)}: give all its values in one --sweep {name}=...")
    for name, instead in AXES.items():
        if getattr(own, instead) and name in swept:
            raise ConfigError(f"--sweep {name}: --{instead} has its values already; give one")
        is_axis = getattr(own, instead) or instead in USUAL
        if is_axis and getattr(run, name) != getattr(RunConfig, name):
            raise ConfigError(f"--{name}: a comparison has many; give --{instead}")
    if run.run:
        raise ConfigError("--run: a comparison has many; give --out")


def parse_sweep(text: str, rest: Sequence[str]) -> tuple[str, list[Any]]:
    """Return the option of a run that ``--sweep`` names, and its values, as the option parses them.

    ``rest``: the options of all runs.

    Raises:
        ConfigError: it is no option of a run, or a value is not one of its values.
    """
    name, has_values, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if name in NOT_SWEPT:
        raise ConfigError(f"--sweep {name}: give {NOT_SWEPT[name]}")
    if not has_values:
        raise ConfigError(f"--sweep {text}: give an option and its values, as lr=0.1,0.01")
    # Numbers belong to the name before; a number alone is a value.
    is_text = isinstance(getattr(RunConfig, name, None), str)
    found = []
    for value in names(f"--sweep {name}", values) if is_text else values.split(","):
        options = [*rest, f"{flag(name)}={value.strip()}"]
        run, _ = parse_options(options, RunConfig, NodeConfig, prog=PROG, about="")
        if name not in names_of(RunConfig):
            raise ConfigError(f"--sweep {name}: is an option of a machine, not of a run")
        found.append(getattr(run, name))
    return name, found


def axes_of(own: Namespace, swept: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Return the values of each axis, and take those out of ``swept`` that it has."""
    given = {
        "scheme": names("--schemes", own.schemes or USUAL["schemes"]),
        "partition": names("--partitions", own.partitions or USUAL["partitions"]),
        "topology": names("--topologies", own.topologies) if own.topologies else (),
        "cut": distinct("--cuts", own.cuts),
    }
    return {AXES[name]: swept.pop(name, found) for name, found in given.items()}


def main() -> None:
    own, rest = parse()
    if own.seeds < 1 or (own.jobs is not None and own.jobs < 1):
        raise ConfigError("--seeds and --jobs: must be at least 1")
    run, node = parse_options(rest, RunConfig, NodeConfig, prog=PROG, about="")
    swept = [parse_sweep(text, rest) for text in own.sweep]
    _refuse_overridden(run, own, [name for name, _ in swept])
    from tqdm import tqdm

    from experiments.compare.figures import draw_all
    from experiments.compare.plan import carry_out, check_all, is_done, on_this_machine
    from experiments.compare.results import read_study, write_tables
    from experiments.compare.study import Study, left_out
    from sfl.interactive.run import open_run
    from sfl.reports.report import write_report

    placed = on_this_machine
    if own.over == "ray":
        os.environ.update(quiet_ray.ENVIRONMENT)
        from experiments.compare.ray_tasks import on_ray as placed

    # The runs are started in another folder.
    paths = {"out": str(node.out_path.resolve()), "data_dir": str(node.data_path.resolve())}
    values = {name: distinct(f"--sweep {name}", found) for name, found in swept}
    study = Study(
        **axes_of(own, values),
        seeds=range(run.seed, run.seed + own.seeds),
        run=replace(run, keep_tensors=own.keep_tensors),
        node=replace(node, **paths),
        over=own.over,
        sweeps=values,
    )
    is_typed = any(option.partition("=")[0] == "--out" for option in rest)
    if node.out == NodeConfig.out and not is_typed:
        study = study.in_own_folder()
    for line in left_out(study):
        print(line, flush=True)
    check_all(study)
    total = len(study.runs) * run.rounds
    done = sum(is_done(study, r) for r in study.runs) * run.rounds
    counted = {"total": total, "initial": done, "unit": "round", "disable": None}
    with placed(study, own) as (study, simulation), tqdm(desc="all runs", **counted) as bar:

        def on_round(of: RunConfig, line: str) -> None:
            bar.update()
            bar.set_postfix_str(f"{of.run}, {line}")
            if bar.disable:  # not in a terminal
                tqdm.write(f"{of.run}: {line}")
                sys.stdout.flush()

        carry_out(study, on_round, simulation)
    lines = read_study(study)
    for path in write_tables(study, lines) + draw_all(study, lines):
        print(path)
    runs = [open_run(study.folder(r), allow_import=node.allow_import) for r in study.runs]
    print(*write_report(runs, study.node.out_path / "report.html"), sep="\n")


if __name__ == "__main__":
    sys.exit(run_program("compare", main))
