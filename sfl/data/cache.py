"""What takes long to read is read once, and kept as arrays that are mapped into memory.

The clients that one user runs on a machine share them. Nothing half-written is ever read: a folder
of arrays gets its name when it is whole.
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

FORMAT = 2  # of what is kept; counts up when something else comes out of the same files


@contextlib.contextmanager
def one_at_a_time(lock_path: Path) -> Iterator[None]:
    """Let the processes of one machine do something one after another.

    Without POSIX file locks (Windows) they may do it at once.
    """
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path, "w") as lock:
        if importlib.util.find_spec("fcntl"):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file closes
        yield


def signature(paths: Iterable[Path]) -> str:
    """Return what tells whether files have changed: their names, sizes and times.

    Raises:
        DataError: one of them cannot be found.
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
    """Return the arrays that ``make`` writes as ``.npy`` files into the folder that it is given.

    It is called once for a ``key``, which says all that the arrays depend on; ``lengths`` has their
    names, and how many rows each has, where that is known. Who writes into the tensors writes into
    a copy of its own.

    Raises:
        DataError: the folder cannot be written, or a file in it is damaged; or from ``make``.
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
    """Create a file for an array of bytes, with the disk that it needs, and map it.

    Raises:
        OSError: there is no room for it; a sparse file would end the process when it is filled.
    """
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array


def _make(whole: Path, make: Callable[[Path], None]) -> None:
    partial = whole.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        make(partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
