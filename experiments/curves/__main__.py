"""Draw a run's curves: training loss and validation accuracy, a client and round.

python -m experiments.curves RUN_DIR
"""

import sys
from pathlib import Path

from sfl.cli import run_program
from sfl.options import Parser


def main() -> None:
    parser = Parser(prog="python -m experiments.curves", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    options = parser.parse_args()
    from experiments.curves.figure import draw_curves

    print(draw_curves(options.run_dir))


if __name__ == "__main__":
    sys.exit(run_program("curves", main))
