"""The replies of a round, kept so that a repeated step gets the identical reply.

Replies that the archive does not record are kept in an unnamed temporary file, which the system
removes when the process ends: after a restart of the server, the round is repeated from its start.
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

EVERYONE = -1  # client of a reply that goes to all clients


class Answer(NamedTuple):
    """The reply to a step."""

    data: Buffer
    content: Mapping[str, float]
    asked: str = ""  # checksum of the request


class Spool:
    """The replies to the steps of one round, by position. Closed by ``close``.

    Replies that the archive records are read from there.

    Raises (from any method):
        RunError: the disk is full, or the archive cannot write.
    """

    def __init__(self, folder: Path | None, flush_archive: Callable[[], None]) -> None:
        """``folder``: for the temporary file; None: keep no replies, since no step is repeated."""
        self._folder = folder
        self._flush_archive = flush_archive
        self._file: IO[bytes] | None = None
        self._size = 0
        self._kept: dict[Position, tuple[Callable[[], bytes], Answer]] = {}

    def start_round(self) -> None:
        """Discard the replies of the previous round; the file is overwritten from its start."""
        self._kept, self._size = {}, 0

    def put(self, at: Position, answer: Answer, recorded: str = "") -> None:
        """Keep a reply; ``recorded``: its path in the archive, if it is recorded there."""
        if self._folder is None:
            return
        if recorded:
            read = functools.partial(self._read_recorded, recorded)
        else:
            read = functools.partial(self._read, self._append(answer.data), len(answer.data))
        self._kept[at] = read, answer._replace(data=b"")

    def has(self, at: Position) -> bool:
        """Return whether a reply is kept."""
        return at in self._kept

    def get(self, at: Position) -> Answer | None:
        """Return the reply to a step; None if there is none yet."""
        if at not in self._kept:
            return None
        read, answer = self._kept[at]
        return answer._replace(data=read())

    def _read_recorded(self, path: str) -> bytes:
        self._flush_archive()
        return Path(path).read_bytes()

    def _append(self, data: Buffer) -> int:
        """Append a reply to the file; return its offset."""
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
