"""The answers of a round, kept until it is over: whoever redoes a step is given the same again.

What the archive does not record lies in a file without a name, which the system removes with the
process: after a restart of the server everyone redoes the round, and nobody asks for them.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from sfl.errors import RunError
from sfl.files.torch_reader import Buffer
from sfl.values import Position

EVERYONE = -1  # instead of a client, for an answer that all are given


class Answer(NamedTuple):
    """What a step was answered with."""

    data: Buffer
    content: Mapping[str, float]
    asked: str = ""  # the checksum of what it answers


class Spool:
    """The answers to the steps of one round, by their position. Closed by ``close``.

    What the archive records anyway is read there.

    Raises (from any method):
        RunError: the disk is full, or the archive's has failed.
    """

    def __init__(self, folder: Path | None, flush_archive: Callable[[], None]) -> None:
        """Without a folder nothing is kept: nobody redoes anything."""
        self._folder = folder
        self._flush_archive = flush_archive
        self._file: IO[bytes] | None = None
        self._size = 0
        self._kept: dict[Position, tuple[Callable[[], bytes], Answer]] = {}

    def start_round(self) -> None:
        """Forget the answers of the round before; the file keeps its size, and is written anew."""
        self._kept, self._size = {}, 0

    def put(self, at: Position, answer: Answer, recorded: str = "") -> None:
        """Keep an answer; ``recorded`` is where the archive has it, if it does."""
        if self._folder is None:
            return
        if recorded:
            read = functools.partial(self._read_recorded, recorded)
        else:
            read = functools.partial(self._read, self._append(answer.data), len(answer.data))
        self._kept[at] = read, answer._replace(data=b"")

    def get(self, at: Position) -> Answer | None:
        """Return the answer to a step; None if it has not been answered."""
        if at not in self._kept:
            return None
        read, answer = self._kept[at]
        return answer._replace(data=read())

    def _read_recorded(self, path: str) -> bytes:
        self._flush_archive()
        return Path(path).read_bytes()

    def _append(self, data: Buffer) -> int:
        """Write an answer behind the others, and return where."""
        offset = self._size
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - see close
                    dir=self._folder, buffering=0
                )
            while self._size < offset + len(data):
                rest = memoryview(data)[self._size - offset :]
                self._size += os.pwrite(self._file.fileno(), rest, self._size)
        except OSError as error:
            raise RunError(f"cannot write to {self._folder}: {error.strerror}") from error
        return offset

    def _read(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        parts = bytearray()
        while len(parts) < size:
            parts += os.pread(self._file.fileno(), size - len(parts), offset + len(parts))
        return bytes(parts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
