"""The programs server, client, simulate and so on: their options, and what they call.

``pyproject.toml`` has the table of those that are installed as ``sfl-NAME``. In a clone,
``run_server.py``, ``run_client.py`` and modules of ``experiments`` such as ``experiments.simulate``
call them.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.errors import ConfigError, command, counted
from sfl.options import Parser, add_options, parse_options
from sfl.program import run_program
from sfl.registry import NAMES

if TYPE_CHECKING:
    from sfl.runtime.recorded_run import RecordedRun

_ALLOW_IMPORT = "package.module:function that the run may import as model"


def main_server(argv: Sequence[str] | None = None) -> int:
    """Run the server's program and return its exit code."""
    prog = command("server")

    def program() -> None:
        from sfl.config import RunConfig
        from sfl.nodes import ServerNode

        about = f"Start the server of a split-learning run; the clients are {command('client')}."
        run, node = parse_options(argv, RunConfig, ServerNode, prog=prog, about=about)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
            from sfl.runtime.torchrun import serve_rank

            return serve_rank(run, node)
        if node.serve:
            from sfl.trained.service import serve_model

            return serve_model(run, node)
        if node.follows:
            from sfl.runtime.follow import follow

            return follow(run, node)
        from sfl.runtime.fed_server import serve_fed  # imports torch, which takes a while
        from sfl.runtime.server import serve

        (serve_fed if node.role == "fed" else serve)(run, node)

    return run_program(prog, program)


def main_client(argv: Sequence[str] | None = None) -> int:
    """Run a client's program and return its exit code."""
    prog = command("client")

    def program() -> int:
        from sfl.nodes import ClientNode

        about = (
            "Take part in a split-learning run; everything about training comes from the server."
        )
        (node,) = parse_options(argv, ClientNode, prog=prog, about=about)
        if node.check_:
            from sfl.runtime.client_check import check

            return check(node)
        from sfl.runtime.client import take_part
        from sfl.runtime.hosting import host

        (host if node.client_ids else take_part)(node)
        return 0

    return run_program(prog, program)


def main_mpi(argv: Sequence[str] | None = None) -> int:
    """Take one part in a run whose processes ``mpirun`` has started, and return the exit code."""
    prog = command("mpi")

    def program() -> None:
        from sfl.config import RunConfig
        from sfl.nodes import ServerNode

        about = "Run server (rank 0) and clients in the processes that mpirun has started."
        run, node = parse_options(argv, RunConfig, ServerNode, prog=prog, about=about)
        from sfl.runtime.on_mpi import take_rank

        take_rank(run, node)

    return run_program(prog, program)


def main_simulate(argv: Sequence[str] | None = None) -> int:
    """Train a configuration in one process, without sockets, and return the exit code."""
    prog = command("simulate")

    def program() -> None:
        from sfl.config import RunConfig
        from sfl.nodes import SimulationNode

        about = (
            "Train a configuration in one process; with --partition own from DATA_DIR/client_0 ..."
        )
        run, node = parse_options(argv, RunConfig, SimulationNode, prog=prog, about=about)
        from sfl.runtime.local_network import Away
        from sfl.runtime.simulation import simulate
        from sfl.tracking.trackers import trackers_of

        away = [Away.parse(text) for text in node.away.split(",") if text]
        simulate(run, node, away, trackers=trackers_of(node.track))

    return run_program(_short(prog), program)


def main_replay(argv: Sequence[str] | None = None) -> int:
    """Recompute a recorded run from its files, bit for bit, and return the exit code."""

    def program() -> int:
        about = "Recompute a recorded run from its files, bit for bit."
        return replay(replay_parser(about).parse_args(argv))

    return run_program(_short(command("replay")), program)


def main_export(argv: Sequence[str] | None = None) -> int:
    """Write a part of a run's trained model as a file for others, and return the exit code."""
    prog = command("export")

    def program() -> None:
        options = _export_parser(prog).parse_args(argv)
        from sfl.interactive.run import open_run
        from sfl.trained.export import export

        run = open_run(options.run_dir, allow_import=options.allow_import)
        of = {"round": options.round, "client": options.client, "out": options.out}
        done = export(run, options.to, options.part, **of)
        for line in done.lines:
            sys.stdout.write(f"{line}\n")

    return run_program(_short(prog), program)


def main_predict(argv: Sequence[str] | None = None) -> int:
    """Predict samples with a trained model, and return the exit code."""
    prog = command("predict")

    def program() -> None:
        options = predict_parser(prog).parse_mixed_args(argv)
        from sfl.trained.predict import predict

        predict(options)

    return run_program(_short(prog), program)


def _export_parser(prog: str) -> Parser:
    about = "Write a part of a run's trained model as one file, for use without SFL."
    parser = Parser(prog=prog, description=about)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="shared_files/server/<run>")
    parser.add_argument("--to", metavar="KIND", required=True, help=NAMES)
    parser.add_argument(
        "--part", default="whole", help="whole (the default), front, back, or a segment's name"
    )
    parser.add_argument(
        "--round", type=int, metavar="R", help="after this round, from 0; -1: before the first"
    )
    parser.add_argument("--client", type=int, metavar="K", help="this client's, not the average")
    parser.add_argument("--out", default="", metavar="FILE", help="by default RUN_PART.SUFFIX here")
    parser.add_argument("--allow-import", default="", help=_ALLOW_IMPORT)
    return parser


def main_watch(argv: Sequence[str] | None = None) -> int:
    """Show a run in the terminal while it goes on, and return the exit code."""

    def program() -> None:
        about = "Watch a run from its folder, without touching it; Ctrl-C ends the watching alone."
        parser = Parser(prog=command("watch"), description=about)
        parser.add_argument(
            "run", metavar="RUN", nargs="?", default="", help="a run's folder or name; the newest"
        )
        parser.add_argument(
            "--out", default="shared_files", help="folder that runs are written into"
        )
        parser.add_argument("--once", action="store_true", help="show one picture and end")
        parser.add_argument(
            "--interval", type=float, default=2.0, metavar="S", help="seconds between pictures (2)"
        )
        given = parser.parse_args(argv)
        if not 0.1 <= given.interval <= 3600:
            raise ConfigError(f"--interval {given.interval:g}: give 0.1 to 3600 seconds")
        from sfl.reports.watch import watch

        watch(given.run, Path(given.out).expanduser(), given.interval, once=given.once)

    return run_program(_short(command("watch")), program)


def predict_parser(prog: str) -> Parser:
    """Return a parser of the options that ``predict`` takes."""
    from sfl.nodes import ClientNode

    about = (
        "Predict images with the trained model of a run; or send a server (run_server.py --serve)"
        " the activations of a front alone."
    )
    usage = f"{prog} RUN [IMAGES ...]\n       {prog} --server HOST:PORT --front FILE [IMAGES ...]"
    parser = Parser(prog=prog, description=about, usage=usage)
    parser.add_argument(
        "paths", nargs="*", metavar="RUN, IMAGES",
        help="shared_files/server/<run> without --server, then images, folders of them, .npz files",
    )  # fmt: skip
    parser.add_argument(
        "--front", default="", metavar="FILE",
        help=f"the client's part of the model, by {command('export')} --to torch; of a u-shaped one"
        " both files, with a comma between them",
    )  # fmt: skip
    parser.add_argument(
        "--test-of",
        default="",
        metavar="RUN",
        help="predict the test samples of this run instead, and compare with its figures",
    )
    parser.add_argument("--csv", default="", metavar="FILE", help="write all predictions there")
    parser.add_argument(
        "--round", type=int, metavar="R", help="the model after this round, from 0; else the last"
    )
    parser.add_argument(
        "--client", type=int, metavar="K",
        help="the front as this client has it; with --test-of, its samples alone",
    )  # fmt: skip
    names = (
        "server connect_timeout peer_timeout token_file tls_ca tls_cert tls_key link memory_limit"
        " device threads data_dir cache_dir allow_import"
    )
    add_options(parser, ClientNode, names)
    return parser


def replay_parser(about: str) -> Parser:
    """Return a parser of the options that ``replay`` takes."""
    parser = Parser(prog=command("replay"), description=about)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="shared_files/server/<run>")
    parser.add_argument("--client", type=int, metavar="K", help="this client's steps only")
    parser.add_argument("--round", type=int, metavar="R", help="this round only, from 0")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the run's, if not given")
    parser.add_argument("--threads", type=int, help="the run's, if not given")
    parser.add_argument("--allow-import", default="", help=_ALLOW_IMPORT)
    return parser


def load_recorded(options: Namespace) -> "RecordedRun":
    """Return the run that the options name, and warn about what may differ in the last bit here."""
    from sfl.runtime.recorded_run import load

    recorded = load(options.run_dir, options.device, options.threads, options.allow_import)
    for difference in recorded.differences:
        sys.stderr.write(f"warning: here {difference} of the run: the last bit may differ\n")
    return recorded


def replay(options: Namespace) -> int:
    """Print what replay finds, then the closing line; return 0 if everything is equal, else 1."""
    from sfl.runtime.replay import check

    report = check(load_recorded(options), options.client, options.round)
    lines = list(report.findings)
    if report.unchecked:
        lines.append(f"{report.unchecked} gradients rest on a damaged file and were not checked")
    if report.incomplete:
        lines.append(f"{report.incomplete} gradients are of rounds of which not all are recorded")
    if report.dropped:
        dropped = counted(report.dropped, "round")
        lines.append(f"{dropped} left nothing to check, as --keep-models has it")
    lines.append(f"{report.models} models checked, {report.models_differ} differ")
    lines.append(report.summary)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if report.findings or report.differ else 0


def main_report(argv: Sequence[str] | None = None) -> int:
    """Show recorded runs side by side on one HTML page, and return the exit code."""
    prog = command("report")

    def program() -> None:
        options = _report_parser(prog).parse_args(argv)
        from sfl.interactive.run import open_runs
        from sfl.reports.report import write_report

        machine = {"clients": options.clients, "allow_import": options.allow_import}
        runs = open_runs(options.run_dirs, **machine)
        paths = write_report(
            runs, options.out, labels=options.labels, formats=options.figures,
            with_tables=options.tables,
        )  # fmt: skip
        sys.stdout.write("".join(f"{path}\n" for path in paths))

    return run_program(_short(prog), program)


def _report_parser(prog: str) -> Parser:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = Parser(prog=prog, description="Show recorded runs side by side on one HTML page.")
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="shared_files/server/<run>; runs that differ"
        " in --seed alone are one curve",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page to write"
        " (default: report.html), or a folder for it; further files lie beside it",
    )  # fmt: skip
    parser.add_argument(
        "--figures", metavar="pdf,svg,png", type=names, default=[], help="write each figure as"
        " files of these kinds too",
    )  # fmt: skip
    parser.add_argument("--tables", action="store_true", help="write the tables as CSV and LaTeX")
    parser.add_argument(
        "--labels", metavar="A,B", type=names, default=[], help="names of the curves; by default"
        " the options that differ",
    )  # fmt: skip
    parser.add_argument(
        "--clients", metavar="DIR", type=Path, nargs="+", default=[], help="clients' folders,"
        " brought here from their machines, for predictions that only they have",
    )  # fmt: skip
    parser.add_argument(
        "--allow-import",
        default="",
        help="package.module:function that a run may import as model",
    )
    return parser


def _short(prog: str) -> str:
    """Return a program's name for its errors: ``replay`` of ``python -m experiments.replay``."""
    return prog.rpartition("experiments.")[2]
