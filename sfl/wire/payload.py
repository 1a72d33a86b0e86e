"""Where a message's payload goes while it comes in: into memory, or, if it is large, onto disk.

On disk it is a file without a name, which the system removes with the process. What came is written
from one small buffer; whoever reads the payload then has the file mapped into memory: of a model of
any size, no more is held than is looked at.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sfl.errors import RunError
from sfl.files.checksum import crc32

LARGE_BYTES = 16 * 2**20  # from which on a payload goes onto disk
_CHUNK_BYTES = 2**20


class Store(Protocol):
    """What one payload is put into."""

    def get_buffer(self) -> memoryview:
        """Return where the next bytes go; never empty while some are missing."""

    def advance(self, num_bytes: int) -> None:
        """Take note that so many have come.

        Raises:
            RunError: they cannot be written.
        """

    def whole(self) -> tuple[bytearray | memoryview, int]:
        """Return the payload, once all has come, and its CRC-32."""


MakeStore = Callable[[int], Store]  # for a payload of so many bytes


class InMemory:
    """A payload in memory."""

    def __init__(self, num_bytes: int) -> None:
        self._data = bytearray(num_bytes)
        self._filled = self._crc = 0

    def get_buffer(self) -> memoryview:
        return memoryview(self._data)[self._filled :]

    def advance(self, num_bytes: int) -> None:
        came = memoryview(self._data)[self._filled : self._filled + num_bytes]
        self._crc = crc32(came, self._crc)
        self._filled += num_bytes

    def whole(self) -> tuple[bytearray, int]:
        return self._data, self._crc


class OnDisk:
    """A payload in a file without a name."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self._folder = folder
        self._missing = num_bytes
        self._chunk = memoryview(bytearray(min(num_bytes, _CHUNK_BYTES)))
        self._filled = self._crc = 0  # bytes of the chunk; of what has been written
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"cannot write to {self._folder}: {error.strerror}")

    def get_buffer(self) -> memoryview:
        return self._chunk[self._filled : self._filled + self._missing]

    def advance(self, num_bytes: int) -> None:
        self._filled += num_bytes
        self._missing -= num_bytes
        if self._missing and self._filled < len(self._chunk):
            return
        rest = self._chunk[: self._filled]
        self._crc = crc32(rest, self._crc)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise self._failed(error) from error
        self._filled = 0

    def whole(self) -> tuple[memoryview, int]:
        try:
            data = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise RunError(f"cannot read from {self._folder}: {error.strerror}") from error
        self._close()  # the mapping keeps the file
        return memoryview(data), self._crc


def onto(folder: Path) -> MakeStore:
    """Return what puts large payloads onto disk, in this folder."""
    return lambda num_bytes: (
        OnDisk(num_bytes, folder) if num_bytes >= LARGE_BYTES else InMemory(num_bytes)
    )
