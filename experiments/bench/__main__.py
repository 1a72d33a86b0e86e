"""How fast a step is: ours, the bare arithmetic, and other ways to train over a cut, in turn.

python -m experiments.bench [--rows mlp-128-1,...] [--blocks 7] [--out FOLDER] [--profile]

A row is a model, a batch size and a number of clients. All contenders of a row live at the same
time; blocks of steps alternate between them, each behind one of the bare arithmetic that it is
compared with, so that a machine whose speed drifts does not decide; the first of each does not
count. Writes bench.csv, bench.md and bench.png. ``--profile`` shows
where the time of our own steps goes, ``--link 100mbit,50ms`` what a slow link makes of them.
"""

import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.bench.rows import ROWS
from sfl.errors import ConfigError
from sfl.options import Parser
from sfl.program import run_program
from sfl.registry import unknown_name
from sfl.values import LinkShape


def main() -> None:
    options = parse()
    rows = {row.name: row for row in ROWS}
    chosen = options.rows.split(",") if options.rows else list(rows)
    for name in chosen:
        if name not in rows:
            raise unknown_name("row", name, rows)
    if min(options.blocks, options.steps) < 1:
        raise ConfigError("--blocks and --steps: give at least 1")
    LinkShape.parse(options.link)
    from experiments.bench.report import phases_table, table, write_all
    from experiments.bench.turns import run_row

    results = []
    # Removed at the end alone: a file system may be slow to create files where many were removed.
    with TemporaryDirectory(prefix="sfl-") as folder:
        for name in chosen:
            (own := Path(folder) / name).mkdir()
            found = run_row(rows[name], options, own)
            print(table(found), flush=True)
            if options.profile:
                print(phases_table(found), flush=True)
            results.append(found)
    for path in write_all(Path(options.out), results):
        print(path)


def parse() -> Namespace:
    parser = Parser(prog="python -m experiments.bench", description=__doc__.partition("\n")[0])
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--rows", default="", help=f"which, of {names} (default: all)")
    parser.add_argument("--blocks", type=int, default=7, help="of each contender (default: 7)")
    parser.add_argument("--steps", type=int, default=60, help="in a peer's block (default: 60)")
    parser.add_argument("--out", default="bench", help="folder of what is written")
    parser.add_argument(
        "--link", default="", help="our own runs over such a link alone, beside what it must take"
    )
    parser.add_argument("--profile", action="store_true", help="show where our time goes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("bench", main))
