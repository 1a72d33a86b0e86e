"""The answers of a round, kept until it is over: whoever redoes a step is given the same again.

They lie in a file without a name, which the system removes with the process: after a restart of the
server everyone redoes the round, and nobody asks for them.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sfl.errors import RunError
from sfl.tensors import Buffer

EVERYONE = -1  # instead of a client, for an answer that all are given


@dataclass(frozen=True)
class Answer:
    """What a step was answered with."""

    data: bytes
    content: Mapping[str, float]
    asked: str  # the checksum of what it answers


class Spool:
    """The answers to the steps of one round, by client and step. Closed by ``close``.

    Raises (from ``put``):
        RunError: the disk is full.
    """

    def __init__(self, folder: Path | None) -> None:
        """Without a folder nothing is kept: nobody redoes anything."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._size = 0
        self._places: dict[tuple[int, int], tuple[int, int, Mapping[str, float], str]] = {}

    def start_round(self) -> None:
        """Forget the answers of the round before."""
        self._places, self._size = {}, 0
        if self._file is not None:
            os.ftruncate(self._file.fileno(), 0)

    def put(
        self, client: int, step: int, data: Buffer, content: Mapping[str, float], asked: str
    ) -> None:
        """Keep an answer."""
        if self._folder is None:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - see close
                    dir=self._folder, buffering=0
                )
            written = 0
            while written < len(data):
                part = memoryview(data)[written:]
                written += os.pwrite(self._file.fileno(), part, self._size + written)
        except OSError as error:
            raise RunError(f"cannot write to {self._folder}: {error.strerror}") from error
        self._places[client, step] = self._size, len(data), content, asked
        self._size += len(data)

    def get(self, client: int, step: int) -> Answer | None:
        """Return the answer to a step; None if it has not been answered."""
        if (client, step) not in self._places:
            return None
        assert self._file is not None
        offset, size, content, asked = self._places[client, step]
        parts = bytearray()
        while len(parts) < size:
            parts += os.pread(self._file.fileno(), size - len(parts), offset + len(parts))
        return Answer(bytes(parts), content, asked)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
