"""The figures of a run as pandas frames."""

import csv
import re
from collections.abc import Iterator

import pandas as pd

from sfl.archive.manifest import ROUND_LOG
from sfl.archive.reader import NOT_A_SERVERS, RunArchive
from sfl.archive.round_log import read_round, read_summary
from sfl.archive.run_folder import SERVER_LOG
from sfl.errors import RunError
from sfl.files.regular_files import read_plain

_OF_STEP = re.compile(r"labels_(\d+)_(\d+)\.pt")
_TEXTS = ("took_part", "missing")
_TIME = len("2026-01-31 23:59:59")  # at the start of a line of the log
Rows = dict[tuple[int, ...], dict[str, float]]  # the metrics of each place


def rounds_table(archive: RunArchive) -> pd.DataFrame:
    """Return ``rounds.csv``, a row for each finished round; floats are those that were written."""
    data = _read_growing(archive, "rounds.csv")
    rows = read_summary(data)
    columns = next(csv.reader([data.decode().partition("\n")[0]]))
    return pd.DataFrame({n: [_value(n, row[n]) for row in rows] for n in columns})


def _read_growing(archive: RunArchive, path: str) -> bytes:
    """Return the bytes of a file that the manifest lists only when the run is over."""
    try:
        return archive.read(path) if archive.lists(path) else read_plain(archive.root / path)
    except FileNotFoundError as error:
        raise RunError(f"{archive.root} has no {path}: {NOT_A_SERVERS}") from error
    except OSError as error:
        raise RunError(f"{archive.root / path}: {error.strerror}") from error


def events(archive: RunArchive) -> list[tuple[str, str]]:
    """Return the lines of the server's log, each with its time."""
    text = _read_growing(archive, SERVER_LOG).decode("utf-8", "replace")
    return [(line[:_TIME], line[_TIME:].strip()) for line in text.splitlines()]


def _value(column: str, text: str) -> str | int | float:
    """Return a value of ``rounds.csv``; Python's floats read back as those that were written."""
    if column in _TEXTS:
        return text
    return int(text) if text.isdigit() else float(text or "nan")


def steps_table(archive: RunArchive) -> pd.DataFrame:
    """Return the metrics of each training step, from the files of the finished rounds."""
    rows: Rows = {}
    for _, client, file, metric, value in _figures(archive):
        if found := _OF_STEP.fullmatch(file):
            place = int(found[1]), int(found[2]), client
            rows.setdefault(place, {})[metric] = value
    return _frame(["round", "step", "client"], rows)


def clients_table(archive: RunArchive) -> pd.DataFrame:
    """Return the metrics of each client's rounds, from the same files."""
    rows: Rows = {}
    for round_index, client, file, metric, value in _figures(archive):
        if not _OF_STEP.fullmatch(file):
            rows.setdefault((round_index, client), {})[metric] = value
    return _frame(["round", "client"], rows)


def _figures(archive: RunArchive) -> Iterator[tuple[int, int, str, str, float]]:
    """Yield what the files of the rounds have: round, client, file, metric, value."""
    for entry in archive.listed:
        if entry.kind == ROUND_LOG:
            for (client, file, metric), value in read_round(archive.read(entry.path)).items():
                yield entry.round, client, file, metric, value


def _frame(places: list[str], rows: Rows) -> pd.DataFrame:
    """Return a row for each place, in order, with its metrics."""
    table = pd.DataFrame(sorted(rows), columns=places)
    return table.join(pd.DataFrame([rows[place] for place in sorted(rows)]))
