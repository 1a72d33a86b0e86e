"""Recompute a recorded run from its files, bit for bit; or train another back on them.

python -m experiments.replay RUN_DIR [--client K] [--round R]
python -m experiments.replay RUN_DIR --train-back --epochs E [--lr LR] [--save FILE]

Prints the findings of ``sfl.runtime.replay``, then the closing line. Exit code 0 if everything is
equal, else 1.
"""

import sys
from argparse import Namespace

from sfl.cli import run_program
from sfl.errors import counted
from sfl.options import Parser


def main() -> int:
    options = parse()
    from experiments.replay.train_back import train_back
    from sfl.runtime.recorded_run import load
    from sfl.runtime.replay import check

    recorded = load(options.run_dir, options.device, options.threads, options.allow_import)
    for difference in recorded.differences:
        print(f"warning: here {difference} of the run: the last bit may differ", file=sys.stderr)
    if options.train_back:
        train_back(recorded, options)
        return 0
    report = check(recorded, options.client, options.round)
    for finding in report.findings:
        print(finding)
    if report.unchecked:
        print(f"{report.unchecked} gradients rest on a damaged file and were not checked")
    if report.incomplete:
        print(f"{report.incomplete} gradients are of rounds of which not all are recorded")
    if report.dropped:
        print(f"{counted(report.dropped, 'round')} left nothing to check, as --keep-models has it")
    print(f"{report.models} models checked, {report.models_differ} differ")
    print(report.summary)
    return 1 if report.findings or report.differ else 0


def parse() -> Namespace:
    parser = Parser(prog="python -m experiments.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="shared_files/server/<run>")
    parser.add_argument("--client", type=int, metavar="K", help="this client's steps only")
    parser.add_argument("--round", type=int, metavar="R", help="this round only")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the run's, if not given")
    parser.add_argument("--threads", type=int, help="the run's, if not given")
    parser.add_argument(
        "--allow-import",
        default="",
        help="package.module:function that the run may import as model",
    )
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
