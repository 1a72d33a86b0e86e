"""The figures of a run as pandas frames."""

import csv
import re

import pandas as pd

from sfl.archive.manifest import ROUND_LOG
from sfl.archive.reader import RunArchive
from sfl.archive.round_log import read_round, read_summary
from sfl.errors import RunError
from sfl.files.regular_files import read_plain

_OF_STEP = re.compile(r"labels_(\d+)_(\d+)\.pt")
_TEXTS = ("took_part", "missing")


def rounds_table(archive: RunArchive) -> pd.DataFrame:
    """Return ``rounds.csv``, a row for each finished round; floats are those that were written."""
    path = "rounds.csv"
    try:  # it is listed when the run is over
        data = archive.read(path) if archive.lists(path) else read_plain(archive.root / path)
    except OSError as error:
        raise RunError(f"{archive.root / path}: {error.strerror}") from error
    rows = read_summary(data)
    columns = next(csv.reader([data.decode().partition("\n")[0]]))
    return pd.DataFrame({n: [_value(n, row[n]) for row in rows] for n in columns})


def _value(column: str, text: str) -> str | int | float:
    """Return a value of ``rounds.csv``; Python's floats read back as those that were written."""
    if column in _TEXTS:
        return text
    return int(text) if text.isdigit() else float(text or "nan")


def steps_table(archive: RunArchive) -> pd.DataFrame:
    """Return the metrics of each training step, from the files of the finished rounds."""
    rows: dict[tuple[int, int, int], dict[str, float]] = {}
    logs = (entry.path for entry in archive.listed if entry.kind == ROUND_LOG)
    for path in logs:
        for (client, file, metric), value in read_round(archive.read(path)).items():
            if found := _OF_STEP.fullmatch(file):
                place = int(found[1]), int(found[2]), client
                rows.setdefault(place, {})[metric] = value
    places = pd.DataFrame(sorted(rows), columns=["round", "step", "client"])
    return places.join(pd.DataFrame([rows[place] for place in sorted(rows)]))
