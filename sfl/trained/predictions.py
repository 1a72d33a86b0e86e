"""Predictions as a table, a CSV file, and figures."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sfl.errors import ConfigError
from sfl.files.atomic import write_file
from sfl.model.metrics import Tally
from sfl.model.task import Task
from sfl.trained.inputs import UNKNOWN, Batch
from sfl.wire.link import one_line

RANKS = 3  # predictions shown of each sample
MOST_SHOWN = 50  # samples in a table on the screen; a CSV file has all
STRANGE = 2.0  # standard deviations of the data set, of the mean of what is predicted
COLUMNS = ("file", "class", "probability", "second", "probability_2", "third", "probability_3")
WIDEST = 60  # of a name in the table


@dataclass(frozen=True)
class Row:
    """The prediction for one sample."""

    name: str
    ranked: Sequence[tuple[str, float]]  # class and probability, the most likely first
    label: str  # its class, if that is known, or ""


@dataclass
class Predictions:
    """The predictions for some samples."""

    task: Task
    classes: Sequence[str]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that the task's outputs can be shown.

        Raises:
            ConfigError: they are no classes.
        """
        if self.task.ranked is None:
            raise ConfigError(
                "the model's task predicts no classes, which is what is shown here; its outputs"
                " are those of sfl.open_run(...).model() in Python"
            )
        self._ranked = self.task.ranked
        self._brightness = 0.0  # sum over samples, in the data set's standard deviations

    def add(self, batch: Batch, outputs: Tensor) -> Tally:
        """Add a batch; return the tally of its samples whose class is known."""
        found = (tensor.tolist() for tensor in self._ranked(outputs, RANKS))
        self._brightness += float(batch.x.float().mean()) * len(batch.names)
        for name, label, shares, indices in zip(batch.names, batch.y.tolist(), *found, strict=True):
            ranked = [(self.classes[i], p) for i, p in zip(indices, shares, strict=True)]
            known = "" if label == UNKNOWN else self.classes[label]
            self.rows.append(Row(name, ranked, known))
        known_rows = batch.y != UNKNOWN
        if not known_rows.any():
            return Tally()
        return self.task.tally(outputs[known_rows], batch.y[known_rows])

    def how_strange(self) -> str:
        """Return a line if the samples are far from those that the model knows; "" if not."""
        mean = self._brightness / max(len(self.rows), 1)
        if abs(mean) < STRANGE:
            return ""
        return (
            f"warning: these samples are {abs(mean):.1f} standard deviations"
            f" {'lighter' if mean > 0 else 'darker'} than the model's training data: is black"
            " taken for white?"
        )

    def table(self) -> str:
        """Return the first rows as a table."""
        shown = self.rows[:MOST_SHOWN]
        cells = [[one_line(row.name[-WIDEST:]), *_texts(row.ranked)] for row in shown]
        head = ["file", "class", "probability", "next", "", "next", ""]
        return "\n".join(_aligned([head[: len(cells[0])], *cells] if cells else []))

    def write(self, path: Path) -> None:
        """Write all rows as CSV; ``label`` is the known class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ranks = max((len(row.ranked) for row in self.rows), default=0)
        writer.writerow([*COLUMNS[: 1 + 2 * ranks], "label"])
        for row in self.rows:
            writer.writerow([row.name, *(v for pair in row.ranked for v in pair), row.label])
        write_file(path, text.getvalue().encode())


def _texts(ranked: Sequence[tuple[str, float]]) -> list[str]:
    return [text for name, share in ranked for text in (one_line(name, 40), f"{share:.4f}")]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
