"""Atomic and durable file writes."""

import contextlib
import os
from pathlib import Path

from sfl.crash import crash_point
from sfl.files.torch_reader import Buffer

BINARY: int = getattr(os, "O_BINARY", 0)  # a flag of ``os.open`` on Windows


def write_file(
    path: Path | str, data: Buffer, *, durable: bool = False, what: str = "file"
) -> None:
    """Write a file whole or not at all: under a temporary name, which is then renamed.

    With ``durable``, the file survives a loss of power once this returns. ``what`` is the prefix of
    its crash points (``sfl.crash``).
    """
    temporary = f"{path}.tmp"
    try:
        stream = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        try:
            write_all(stream, data)
            if durable:
                os.fsync(stream)
        finally:
            os.close(stream)
        crash_point(f"{what}.before_rename")
        os.replace(temporary, path)
        crash_point(f"{what}.after_rename")
        if durable:
            sync(Path(path).parent)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_all(descriptor: int, data: Buffer) -> None:
    """Write all bytes to an open file, in as many system calls as needed."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
