"""Reading regular files only, from folders whose contents are not trusted."""

import os
import stat
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


def check_linkless(folder: Path) -> None:
    """Check that a folder has no symbolic links, so that reads stay inside it.

    Raises:
        OSError: the folder has a link.
    """
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise OSError(0, "is a link: a run's files lie in its folder", entry.path)
                if entry.is_dir():
                    waiting.append(Path(entry.path))


def check_no_links(folder: Path) -> None:
    """Check that a folder holds only folders and unshared files, so that writes stay inside it.

    Raises:
        OSError: the folder holds a symbolic or hard link, a pipe or a device.
    """
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(Path(entry.path))
                elif not stat.S_ISREG(status.st_mode):
                    raise OSError(0, "is a link, or no file", entry.path)
                elif status.st_nlink > 1:
                    why = "is a file elsewhere as well, by a hard link: copy the folder (cp -r)"
                    raise OSError(0, why, entry.path)
