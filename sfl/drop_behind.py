"""Writing files that nobody reads soon into the same memory again and again.

A file's bytes stay in the page cache once they are on disk, and those of the next take new memory.
In a virtual machine whose host hands memory out when it is first touched that takes longer than
the copy: 7 to 11 µs for each 4 KiB, where the copy takes 1. And it crowds out what is read again.
"""

import contextlib
import os
from collections import deque

MIN_BYTES = 2**16  # of less, what is saved is less than it takes
NUM_LATEST = 8  # files that are given the time to reach the disk
_CAN_ADVISE = hasattr(os, "posix_fadvise")  # Windows and macOS cannot


class DropBehind:
    """Lets the page cache forget files some time after they were written; for one thread at a time.

    It keeps their last few open, until ``close``. All this is for speed: what fails does no harm.
    """

    def __init__(self) -> None:
        self._latest: deque[int] = deque()

    def take(self, descriptor: int, num_bytes: int) -> None:
        """Take note of a file that was written in one go and is about to be closed."""
        if num_bytes < MIN_BYTES or not _CAN_ADVISE:
            return
        with contextlib.suppress(OSError):
            _advise(descriptor)  # begins to write it; what is not on disk stays
            self._latest.append(os.dup(descriptor))
        if len(self._latest) > NUM_LATEST:
            self._forget_oldest()

    def close(self) -> None:
        """Keep no file open any more."""
        while self._latest:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        descriptor = self._latest.popleft()
        with contextlib.suppress(OSError):
            _advise(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _advise(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
