"""What takes long to read is read once, and kept as arrays that are mapped into memory.

The clients of one machine share them. Nothing half-written is ever read: a folder of arrays gets
its name when it is whole.
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
    """Return what tells whether files have changed: their names, sizes and times."""
    lines = []
    for path in paths:
        status = path.stat()
        lines.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def cached(folder: Path, name: str, key: str, make: Callable[[Path], None]) -> Mapping[str, Tensor]:
    """Return the arrays that ``make`` writes as ``.npy`` files into the folder that it is given.

    It is called once for a ``key``, which says all that the arrays depend on. Who writes into the
    tensors writes into a copy of its own.

    Raises:
        DataError: the folder cannot be written; or from ``make``.
    """
    whole = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        if not whole.is_dir():
            with one_at_a_time(folder / f"{name}.lock"):
                if not whole.is_dir():
                    _make(whole, make)
        return {path.stem: _map(path) for path in sorted(whole.glob("*.npy"))}
    except OSError as error:
        raise DataError(
            f"cannot write or read the cache {whole}: {error.strerror or error}; --cache-dir may"
            " name another folder"
        ) from error
    except ValueError as error:
        raise DataError(f"the cache {whole} is damaged ({error}); remove it") from error


def _map(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _make(whole: Path, make: Callable[[Path], None]) -> None:
    partial = whole.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(mode=0o700)
    try:
        make(partial)
        for path in (*partial.iterdir(), partial):
            with _opened(path) as descriptor:
                os.fsync(descriptor)
        partial.rename(whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
