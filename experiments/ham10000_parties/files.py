"""HAM10000 as the files of two parties: images with labels, and the patients' metadata."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sfl.data.client_data import Source
from sfl.data.ham10000 import CLASSES, is_test, load_ham10000, read_metadata
from sfl.data.samples import Samples
from sfl.errors import DataError

TEXTS = ("sex", "localization")  # columns of few values; one is "unknown"
OLDEST = 100.0  # years: ages are divided by it


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


def write_files(data_dir: Path, cache_dir: Path, out: Path, side: int) -> Iterator[str]:
    """Write both parties' files, with square images of this side; yield what they hold.

    Raises:
        DataError: HAM10000 is not there, or damaged.
    """
    shape = (3, side, side)
    rows = read_metadata(data_dir / "HAM10000")
    tests = is_test(rows).numpy()
    loaded = load_ham10000(Source(data_dir, cache_dir, shape))
    x, y = images_of(*loaded, tests)
    ids, table = np.array([row["image_id"] for row in rows]), table_of(rows)
    write(out / "client_0", ids, tests, x=x, y=np.array(CLASSES)[y])
    reverse = slice(None, None, -1)
    write(out / "client_1", ids[reverse], tests[reverse], x=table[reverse])
    yield f"{len(ids)} samples: images {list(shape)} and labels in {out / 'client_0'},"
    yield f"a table of {table.shape[1]} columns in {out / 'client_1'}"
