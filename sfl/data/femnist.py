"""FEMNIST in LEAF's JSON (Caldas et al. 2018, arXiv 1812.01097): characters by their writers.

::

    DIR/FEMNIST/data/train/*.json    {"users": [writer, ...], "user_data": {writer: {"x", "y"}}}
    DIR/FEMNIST/data/test/*.json     or .json.gz

Pixels are in [0, 1], with dark characters on a white background of 1.0: the reverse of MNIST. They
are not inverted.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfl.data.cache import cached, signature
from sfl.data.client_data import Source
from sfl.data.samples import Samples
from sfl.errors import DataError

NUM_CLASSES = 62
# What reading a damaged file raises, besides our own errors.
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
    RecursionError, zlib.error,
)  # fmt: skip
SIDE = 28


def load_femnist(source: Source) -> tuple[Samples, Samples]:
    """Load LEAF's training and test samples with their writers.

    The files are parsed once; later loads read the cache.

    Raises:
        DataError: the files are missing, damaged, or not LEAF's.
    """
    folder = source.folder / "FEMNIST" / "data"
    files = {part: _files(folder / part) for part in ("train", "test")}

    def parse(into: Path) -> None:
        count = sum(map(len, files.values()))
        source.say(f"parsing {count} files of FEMNIST; the next start reads what is kept of them")
        writers: dict[str, int] = {}
        for part, paths in files.items():
            for name, array in _parse(paths, writers).items():
                np.save(into / f"{part}_{name}.npy", array)

    key = "\n".join(f"{part}\n{signature(paths)}" for part, paths in files.items())
    arrays = dict.fromkeys((f"{part}_{n}" for part in files for n in ("x", "y", "writers")), None)
    kept = cached(source.cache, "femnist", key, arrays, parse)
    train, test = (
        Samples(kept[f"{part}_x"], kept[f"{part}_y"], kept[f"{part}_writers"]) for part in files
    )
    return train, test


def _files(folder: Path) -> list[Path]:
    found = (*folder.glob("*.json"), *folder.glob("*.json.gz"))
    paths = sorted(path for path in found if not path.name.startswith("."))  # without hidden files
    if not paths:
        raise DataError(
            f"no .json or .json.gz in {folder}: make FEMNIST with LEAF"
            " (github.com/TalwalkarLab/leaf) and give --data-dir the folder that has"
            " FEMNIST/data/train and FEMNIST/data/test"
        )
    return paths


def _parse(paths: list[Path], writers: dict[str, int]) -> Mapping[str, np.ndarray]:
    """Return ``x``, ``y`` and ``writers`` of some files, and number the writers that are new."""
    xs, ys, by = [], [], []
    for path in paths:
        for writer, x, y in _read(path):
            xs.append(x)
            ys.append(y)
            by.append(np.full(len(y), writers.setdefault(writer, len(writers)), np.int64))
    if not ys:
        raise DataError(f"{paths[0].parent} names no writers")
    return {"x": np.concatenate(xs), "y": np.concatenate(ys), "writers": np.concatenate(by)}


def _read(path: Path) -> "list[tuple[str, np.ndarray, np.ndarray]]":
    """Return each writer of a file with ``x``: (N, 1, 28, 28) uint8 and ``y``: (N,) int64."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            content = json.load(stream)
        return [
            (name, *_arrays(path, name, content["user_data"][name])) for name in content["users"]
        ]
    except _DAMAGE as error:
        raise DataError(
            f"{path} is damaged or not LEAF's: {type(error).__name__} {error}"
        ) from error


def _arrays(path: Path, writer: str, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(data["x"], dtype=np.float64), np.array(data["y"])
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or x.shape != (len(y), SIDE * SIDE):
        raise DataError(
            f"{path}: writer {writer!r} has x of shape {list(x.shape)} and y of shape"
            f" {list(y.shape)}; wanted are [N, {SIDE * SIDE}] and [N] integers"
        )
    if not 0 <= y.min() <= y.max() < NUM_CLASSES:
        raise DataError(f"{path}: writer {writer!r} has labels outside 0 to {NUM_CLASSES - 1}")
    pixels = np.rint(x * 255)
    if not (0 <= pixels.min() <= pixels.max() <= 255 and np.abs(pixels - x * 255).max() < 1e-3):
        raise DataError(f"{path}: writer {writer!r} has pixels that are not k/255 in [0, 1]")
    return pixels.astype(np.uint8).reshape(-1, 1, SIDE, SIDE), y.astype(np.int64)
