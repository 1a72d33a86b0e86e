"""Reading regular files only, from folders whose contents are not trusted."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def read_plain(path: Path, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Return the bytes of a regular file: all, or at most ``num_bytes`` from ``offset`` on.

    Anything else is refused: reading a pipe or a device may never end, and a link may lead to
    another user's file.

    Raises:
        OSError: the file cannot be read or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is no regular file", str(path))
        wanted = status.st_size if num_bytes is None else num_bytes
        count = min(wanted, status.st_size - offset)
        if count <= 0:
            return b""
        file.seek(offset)
        return file.read(count)


def which_file(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file or folder; None if there is none at this path."""
    try:
        status = os.lstat(path)  # a link counts as a file of its own
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def check_linkless(folder: Path, *, apart: Path | None = None) -> None:
    """Check that a folder has no symbolic links, so that reads stay inside it.

    ``apart``: a folder in it whose contents nobody reads.

    Raises:
        OSError: the folder has a link.
    """
    for entry in _entries(folder, apart):
        if entry.is_symlink():
            raise OSError(0, "is a link: a run's files lie in its folder", entry.path)


def check_no_links(folder: Path, *, apart: Path | None = None) -> None:
    """Check that a folder holds only folders and unshared files, so that writes stay inside it.

    ``apart``: a folder in it into whose files and folders nobody writes.

    Raises:
        OSError: the folder holds a symbolic or hard link, a pipe or a device.
    """
    for entry in _entries(folder, apart):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is a link, or no file", entry.path)
        if status.st_nlink > 1:
            why = "is a file elsewhere as well, by a hard link: copy the folder (cp -r)"
            raise OSError(0, why, entry.path)


def _entries(folder: Path, apart: Path | None) -> Iterator[os.DirEntry[str]]:
    """Yield what lies in a folder at any depth, but not what lies in the folder ``apart``.

    A run may write there: what has just been listed may be gone, renamed or removed.
    """
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        try:
            listed = os.scandir(inside)
        except FileNotFoundError:
            if inside == folder:
                raise
            continue
        with listed as entries:
            for entry in entries:
                yield entry
                path = Path(entry.path)
                if path != apart and entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
