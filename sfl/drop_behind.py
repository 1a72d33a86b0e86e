"""Writing files that nobody reads soon into the same memory again and again.

A file's bytes stay in the page cache once they are on disk, and those of the next take new memory.
In a virtual machine whose host hands memory out when it is first touched that takes longer than
the copy: 7 to 11 µs for each 4 KiB, where the copy takes 1. And it crowds out what is read again.
"""

import contextlib
import os

MIN_BYTES = 2**15  # of less, it saves nothing
GROUP = 16  # files: the disk is woken for each that goes alone
_CAN_ADVISE = hasattr(os, "posix_fadvise")  # Windows and macOS cannot


class DropBehind:
    """Lets the page cache forget files some time after they were written; for one thread at a time.

    They go in groups: onto their way to the disk once a group is whole, and out of the cache once
    the next one is. Until then, or ``close``, they stay open. All this is for speed: what fails
    does no harm.
    """

    def __init__(self) -> None:
        self._latest: list[int] = []
        self._on_their_way: list[int] = []

    def take(self, descriptor: int, num_bytes: int) -> None:
        """Take note of a file that was written in one go and is about to be closed."""
        if num_bytes < MIN_BYTES or not _CAN_ADVISE:
            return
        with contextlib.suppress(OSError):
            self._latest.append(os.dup(descriptor))
        if len(self._latest) >= GROUP:
            self._forget_on_their_way()
            self._on_their_way, self._latest = self._latest, []
            for file in self._on_their_way:
                _advise(file)  # begins to write it; what is not on disk stays

    def close(self) -> None:
        """Keep no file open any more."""
        self._forget_on_their_way()
        self._on_their_way, self._latest = self._latest, []
        self._forget_on_their_way()

    def _forget_on_their_way(self) -> None:
        while self._on_their_way:
            file = self._on_their_way.pop()
            _advise(file)
            with contextlib.suppress(OSError):
                os.close(file)


def _advise(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
