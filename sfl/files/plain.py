"""Files in folders that somebody else may have filled: read as what they claim to be, or not."""

import os
import stat
from pathlib import Path


def read_plain(path: Path, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """Return the bytes of a regular file: all, or at most so many from ``offset`` on.

    A pipe or a device under the file's name would wait, or give bytes, without end; a link would
    give somebody else's.

    Raises:
        OSError: it cannot be read, or is no regular file.
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
    """Return which file or folder lies under a name, whatever it is called; None if none does."""
    try:
        status = os.lstat(path)  # a link to it is another one
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def check_linkless(folder: Path) -> None:
    """See that whatever is read from a folder lies in it: that it has no links.

    Raises:
        OSError: it has one.
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
    """See that whatever is written into a folder from now on stays in it.

    Raises:
        OSError: it has a link, or a pipe or the like, among its files.
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
