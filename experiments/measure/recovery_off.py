"""A server of this process that does without recovery in every other block of rounds."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from sfl.archive.spool import Spool
from sfl.archive.writer import ArchiveWriter
from sfl.runtime.rounds import Rounds

BLOCK = 3  # rounds with, rounds without, ...


@contextlib.contextmanager
def switched_off_in_turn(seconds: dict[bool, list[float]]) -> Iterator[None]:
    """Let every other block of rounds do without what recovery needs, and time them all."""
    is_on = True
    whole_round, commit, put, fsync = Rounds._round, ArchiveWriter.commit, Spool.put, os.fsync

    def timed_round(rounds: Rounds, round_index: int) -> dict[str, float]:
        nonlocal is_on
        is_on = round_index // BLOCK % 2 == 0
        started = time.perf_counter()
        figures = whole_round(rounds, round_index)
        if round_index % BLOCK:  # what the block before left to be written ends in its first round
            seconds[is_on].append(time.perf_counter() - started)
        return figures

    def only_if_on(call: Any) -> Any:
        return lambda *given, **named: call(*given, **named) if is_on else None

    with (
        patch.object(Rounds, "_round", timed_round),
        patch.object(ArchiveWriter, "commit", only_if_on(commit)),
        patch.object(Spool, "put", only_if_on(put)),
        patch.object(os, "fsync", only_if_on(fsync)),
    ):
        yield
