"""Buffers for incoming payloads: in memory, or on disk for large ones.

A large payload goes through a small buffer into an unnamed temporary file, which the system removes
when the process ends. The file is then mapped: memory holds only the pages in use.
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

LARGE_BYTES = 16 * 2**20  # payloads of at least this size go to disk
_CHUNK_BYTES = 2**20


class Store(Protocol):
    """The buffer of one payload."""

    def get_buffer(self) -> memoryview:
        """Return the buffer for the next bytes; not empty while any are missing."""

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` that were read into the buffer.

        Raises:
            RunError: they cannot be written to disk.
        """

    def finish(self) -> tuple[bytearray | memoryview, int]:
        """Return the complete payload and its CRC-32."""


MakeStore = Callable[[int], Store]  # from the payload's size in bytes


class InMemory:
    """A payload in memory."""

    def __init__(self, num_bytes: int) -> None:
        self._data = bytearray(num_bytes)
        self._filled = self._crc = 0

    def get_buffer(self) -> memoryview:
        return memoryview(self._data)[self._filled :]

    def advance(self, num_bytes: int) -> None:
        received = memoryview(self._data)[self._filled : self._filled + num_bytes]
        self._crc = crc32(received, self._crc)
        self._filled += num_bytes

    def finish(self) -> tuple[bytearray, int]:
        return self._data, self._crc


class OnDisk:
    """A payload in an unnamed temporary file."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self._folder = folder
        self._missing = num_bytes
        self._chunk = memoryview(bytearray(min(num_bytes, _CHUNK_BYTES)))
        self._filled = self._crc = 0  # bytes in the chunk; CRC of the bytes written
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

    def finish(self) -> tuple[memoryview, int]:
        try:
            data = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise RunError(f"cannot read from {self._folder}: {error.strerror}") from error
        self._close()  # the mapping keeps the file alive
        return memoryview(data), self._crc


def payload_store_in(folder: Path) -> MakeStore:
    """Return a function that makes buffers: in ``folder`` for large payloads, else in memory."""
    return lambda num_bytes: (
        OnDisk(num_bytes, folder) if num_bytes >= LARGE_BYTES else InMemory(num_bytes)
    )
