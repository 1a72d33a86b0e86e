"""Train a configuration in one process, without sockets, and write the same files.

python -m experiments.simulate [run options]
"""

import sys

from sfl.cli import run_program
from sfl.config import RunConfig
from sfl.nodes import SimulationNode
from sfl.options import parse_options


def main() -> None:
    prog = "python -m experiments.simulate"
    about = "Train a configuration in one process; with --partition own from DATA_DIR/client_0 ..."
    run, node = parse_options(None, RunConfig, SimulationNode, prog=prog, about=about)
    from sfl.runtime.simulation import Away, simulate
    from sfl.tracking.trackers import trackers_of

    away = [Away.parse(text) for text in node.away.split(",") if text]
    simulate(run, node, away, trackers=trackers_of(node.track))


if __name__ == "__main__":
    sys.exit(run_program("simulate", main))
