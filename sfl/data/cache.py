"""A cache of decoded data sets: arrays on disk, mapped into memory.

All clients of one user on a machine share it. A folder of arrays is renamed to its final name only
when it is complete, so no reader sees a partial one.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfl.errors import DataError
from sfl.files.atomic import sync

FORMAT = 2  # version of the cached arrays; count up when the same source files give other arrays


@contextlib.contextmanager
def one_at_a_time(lock_path: Path) -> Iterator[None]:
    """Hold a lock file, so that the processes of one machine enter one after another.

    Without POSIX file locks (Windows), several may enter at once.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path, "w") as lock:
        if importlib.util.find_spec("fcntl"):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        yield


def signature(paths: Iterable[Path]) -> str:
    """Return a text that changes when one of the files changes: their names, sizes and times.

    Raises:
        DataError: a file cannot be read.
    """
    lines = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        lines.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def cached(
    folder: Path,
    name: str,
    key: str,
    lengths: Mapping[str, int | None],
    make: Callable[[Path], None],
) -> Mapping[str, Tensor]:
    """Return the arrays of ``key``; ``make`` writes them as ``.npy`` files if they are not cached.

    ``make`` gets the folder to write into. ``key`` identifies everything that the arrays depend on.
    ``lengths`` has the name of each array and its number of rows, if known. The tensors are mapped
    copy-on-write: writing to them does not change the cache.

    Raises:
        DataError: the folder cannot be written, or a cached file is damaged; also as ``make``.
    """
    digest = hashlib.sha256(f"{FORMAT}\n{key}".encode()).hexdigest()[:16]
    whole = folder / f"{name}-{digest}"
    try:
        if not whole.is_dir():
            with one_at_a_time(folder / f"{name}.lock"):
                if not whole.is_dir():
                    _make(whole, make)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {whole}: {error.strerror or error}; --cache-dir may name"
            " another folder"
        ) from error
    return {array: _map(whole / f"{array}.npy", length) for array, length in lengths.items()}


def _map(path: Path, length: int | None) -> Tensor:
    try:
        array = torch.from_numpy(np.load(path, mmap_mode="c"))
        if length not in (None, len(array)):
            raise ValueError(f"{len(array)} rows instead of {length}")
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(
            f"the cache {path.parent} is damaged ({error}); remove it, or name another --cache-dir"
        ) from error
    return array


def new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a file for an array of bytes, allocate its disk space, and map it.

    Raises:
        OSError: the disk is full. Writing to a sparse file would kill the process instead.
    """
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array


def _make(whole: Path, make: Callable[[Path], None]) -> None:
    partial = whole.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        make(partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
