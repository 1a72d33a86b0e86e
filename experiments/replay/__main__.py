"""Recompute a recorded run from its files, bit for bit; or train another back on them.

python -m experiments.replay RUN_DIR [--client K] [--round R]
python -m experiments.replay RUN_DIR --train-back --epochs E [--lr LR] [--save FILE]

The first is the program ``sfl-replay`` of an installed package: it prints the findings of
``sfl.runtime.replay``, then the closing line. Exit code 0 if everything is equal, else 1.
"""

import sys
from argparse import Namespace

from sfl.cli import load_recorded, replay, replay_parser
from sfl.program import run_program


def main() -> int:
    options = parse()
    if not options.train_back:
        return replay(options)
    from experiments.replay.train_back import train_back

    train_back(load_recorded(options), options)
    return 0


def parse() -> Namespace:
    parser = replay_parser(__doc__.partition("\n")[0])
    offline = parser.add_argument_group("train another back")
    offline.add_argument("--train-back", action="store_true", help="on the recorded activations")
    offline.add_argument("--epochs", type=int, default=5, help="passes over them (default: 5)")
    offline.add_argument("--lr", type=float, help="the run's, if not given")
    offline.add_argument("--optimizer", help="the run's, if not given")
    offline.add_argument("--seed", type=int, help="the run's, if not given")
    offline.add_argument("--save", metavar="FILE", help="write the trained back there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("replay", main))
