"""How long averaging takes through each way for weights, in one run of this program.

python -m experiments.measure.weights_times [--megabytes 50] [--clients 3] [--weights socket,dir:PATH,gs://...]

Clients on threads of this process each give a front of that size, the server averages them and
every client takes the average back: what happens between a round's last step and its evaluation,
over real connections of this machine. ``STORAGE_EMULATOR_HOST`` names an emulator.
"""

import sys
import threading
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from sfl.errors import SflError
from sfl.options import Parser
from sfl.program import run_program


def parse() -> Namespace:
    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.measure.weights_times", description=about)
    parser.add_argument("--weights", default="socket", help="ways, with commas (default: socket)")
    parser.add_argument("--megabytes", type=float, default=50.0, help="of a front (default: 50)")
    parser.add_argument("--clients", type=int, default=3, help="number of clients (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to time (default: 3)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from experiments.measure.weight_exchange import Timing, time_rounds

    print("| weights | seconds a round, each | median |")
    print("| --- | --- | --- |")
    for address in options.weights.split(","):
        with TemporaryDirectory(prefix="sfl-") as folder:
            timing = Timing(address, options, Path(folder))
            if place := timing.options("check").open_place():
                place.check()
            try:
                seconds = time_rounds(timing, options.clients)
            except (SflError, threading.BrokenBarrierError) as error:
                raise timing.failure or error from error
        each = ", ".join(f"{s:.2f}" for s in seconds)
        median = sorted(seconds)[len(seconds) // 2]
        print(f"| {address} | {each} | {median:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_program("weights_times", main))
