"""Check an address for weights before a run: whether it can be used, and how fast it is.

python -m experiments.weights_store --weights gs://BUCKET/PREFIX | dir:PATH [--megabytes 10]

Writes an object, reads it back, sees that it cannot be overwritten, and deletes it. Whatever is
missing (bucket, permission, credentials, clock, network) is one line. Exit code 0 if a run can use
the place.
"""

import os
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sfl.errors import ConfigError, IntegrityError, RunError
from sfl.options import Parser
from sfl.program import run_program
from sfl.weights.object_store import ObjectStore
from sfl.weights.stores import open_place


def parse() -> Namespace:
    about = __doc__.partition("\n")[0]
    parser = Parser(prog="python -m experiments.weights_store", description=about)
    parser.add_argument("--weights", required=True, help="dir:PATH or gs://BUCKET/PREFIX")
    parser.add_argument("--megabytes", type=float, default=10.0, help="of the object (default: 10)")
    parser.add_argument("--weights-timeout", type=float, default=60.0, help="as the programs'")
    return parser.parse_args()


def timed(what: str, call: Callable[[], object], num_bytes: int = 0) -> object:
    """Do something and print how long it took."""
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    rate = f", {num_bytes / seconds / 1e6:.1f} MB/s" if num_bytes else ""
    print(f"{what}: {seconds:.2f} s{rate}", flush=True)
    return result


def check_place(place: ObjectStore, num_bytes: int) -> None:
    """Do with a place what a run does with it.

    Raises:
        ConfigError, RunError: it cannot be used.
        IntegrityError: it gives back something else.
    """
    timed("reached", place.check)
    path, data = f"check/{uuid.uuid4().hex}.pt", os.urandom(num_bytes)
    about = {"what": "a check, to be deleted"}
    timed("written", lambda: place.create(path, data, about), num_bytes)
    try:
        if timed("read back", lambda: place.read(path), num_bytes) != (data, about):
            raise IntegrityError(f"{place.title} gives back something else than was written")
        timed("written again, with the same content", lambda: place.create(path, data, about))
        try:
            place.create(path, b"something else", about)
        except RunError:
            print("it cannot be overwritten")
        else:
            raise IntegrityError(f"{place.title} lets an object be overwritten")
    finally:
        try:
            timed("deleted", lambda: place.delete(path))
        except RunError:  # a run needs no such permission
            print(f"{path} stays there: this account may not delete objects, as a run need not")


def main() -> None:
    options = parse()
    if not (0 < options.megabytes <= 10_000 and options.weights_timeout > 0):
        raise ConfigError("--megabytes and --weights-timeout: give numbers above 0")
    with TemporaryDirectory(prefix="sfl-") as folder:
        timeout_s = options.weights_timeout
        place = open_place(options.weights, Path(folder), timeout_s=timeout_s, say=print)
        if place is None:
            print("socket: weights go over the run's own connections; there is nothing to check")
            return
        check_place(place, max(int(options.megabytes * 1e6), 1))
        print(f"{place.title} can be used: --weights {options.weights}")


if __name__ == "__main__":
    sys.exit(run_program("weights_store", main))
