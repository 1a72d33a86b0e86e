"""``--track csv``: every figure in one table."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from sfl.files.atomic import write_file
from sfl.tracking.tracked import Row, TrackedRound, TrackedRun

COLUMNS = ("round", "step", "client", "metric", "value")
NAME = "figures.csv"


class LongTable:
    """Writes a line a figure; step and client are empty where they do not apply."""

    package: ClassVar[str] = ""
    histograms = 0

    def __init__(self) -> None:
        self._path = Path()

    def start(self, run: TrackedRun) -> str:
        self._path = run.folder / NAME
        kept = _lines_before(self._path, run.first_round) if run.is_resumed else b""
        write_file(self._path, kept or (",".join(COLUMNS) + "\n").encode())
        return f"every figure goes into {self._path}"

    def add(self, done: TrackedRound) -> None:
        with open(self._path, "a", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            for rows in (done.rows(), done.step_rows()):
                table.writerows(_line(done.index, row) for row in rows)

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Do nothing: the last round's lines are the summary."""


def _line(round_index: int, row: Row) -> tuple[object, ...]:
    """Return a figure's line; csv writes None as an empty field."""
    return round_index, row.step, row.client, row.metric, row.value


def _lines_before(path: Path, round_index: int) -> bytes:
    """Return the header and the whole lines of earlier rounds; b"" if there is no table."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return b"".join(whole[:1] + [n for n in whole[1:] if int(n.split(b",")[0]) < round_index])
