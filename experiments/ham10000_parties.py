"""Divide HAM10000 between two parties: one has the images and the labels, the other the metadata.

python -m experiments.ham10000_parties --data-dir DIR --out DIR [--image-size 64]

Writes DIR/client_0/ham10000.npz (images, labels) and DIR/client_1/ham10000.npz (age, sex, place of
the lesion), with the images' names as ids, each in an order of its own; then a run trains on both::

    run_server.py --topology vertical --partition own --dataset ham10000 --clients 2 \
        --model cnn-cifar10 --cut 9 --party-models cnn-cifar10,mlp --image-size 64
    run_client.py --client-id 0 --data-dir DIR/client_0
    run_client.py --client-id 1 --data-dir DIR/client_1
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sfl.cli import run_program
from sfl.data.client_data import Source
from sfl.data.ham10000 import CLASSES, is_test, load_ham10000, read_metadata
from sfl.data.samples import Samples
from sfl.errors import DataError
from sfl.options import Parser

TEXTS = ("sex", "localization")  # columns of few values; one is "unknown"
OLDEST = 100.0  # years: ages are divided by it


def parse() -> Namespace:
    parser = Parser(
        prog="python -m experiments.ham10000_parties", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that has HAM10000")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="decoded images")
    parser.add_argument("--out", type=Path, required=True, help="folder of both parties' files")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default: 64)")
    return parser.parse_args()


def table_of(rows: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Return the metadata: (N, F) float32: age, whether it is known, and 0 or 1 for each value.

    Raises:
        DataError: a column is missing, or an age is no number.
    """
    try:
        ages = np.array([[float(row["age"] or "nan")] for row in rows], np.float32) / OLDEST
        texts = [np.array([row[name] for row in rows]) for name in TEXTS]
    except (KeyError, ValueError) as error:
        raise DataError(f"HAM10000's metadata have no age, sex or localization: {error}") from error
    known = np.isfinite(ages)
    values = [column[:, None] == np.unique(column) for column in texts]
    return np.hstack([np.where(known, ages, 0), known, *values]).astype(np.float32)


def write(folder: Path, ids: np.ndarray, tests: np.ndarray, **columns: np.ndarray) -> None:
    """Write one party's training and test samples, in the given order."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for suffix, rows in (("", ~tests), ("_test", tests)):
        chosen = np.flatnonzero(rows)
        arrays[f"ids{suffix}"] = ids[chosen]
        arrays |= {f"{name}{suffix}": values[chosen] for name, values in columns.items()}
    np.savez(folder / "ham10000.npz", **arrays)


def images_of(train: Samples, test: Samples, tests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels in the order of the metadata's rows."""
    x = np.empty((len(tests), *train.sample_shape), np.uint8)
    y = np.empty(len(tests), np.int64)
    for part, rows in ((train, ~tests), (test, tests)):
        x[rows], y[rows] = part.x.numpy(), part.y.numpy()
    return x, y


def main() -> None:
    options = parse()
    shape = (3, options.image_size, options.image_size)
    rows = read_metadata(options.data_dir / "HAM10000")
    tests = is_test(rows).numpy()
    loaded = load_ham10000(Source(options.data_dir, options.cache_dir, shape))
    x, y = images_of(*loaded, tests)
    ids, table = np.array([row["image_id"] for row in rows]), table_of(rows)
    write(options.out / "client_0", ids, tests, x=x, y=np.array(CLASSES)[y])
    reverse = slice(None, None, -1)
    write(options.out / "client_1", ids[reverse], tests[reverse], x=table[reverse])
    print(f"{len(ids)} samples: images {list(shape)} and labels in {options.out / 'client_0'},")
    print(f"a table of {table.shape[1]} columns in {options.out / 'client_1'}")


if __name__ == "__main__":
    sys.exit(run_program("ham10000_parties", main))
