"""Files in folders that somebody else may have filled: read as what they claim to be, or not."""

import os
import stat
from pathlib import Path


def read_plain(path: Path, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Return the bytes of a regular file: all, or at most so many from ``offset`` on.

    A pipe or a device under the file's name would wait, or give bytes, without end.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is no regular file", str(path))
        wanted = status.st_size if num_bytes is None else num_bytes
        file.seek(max(offset, 0))
        return file.read(max(min(wanted, status.st_size - offset), 0))
