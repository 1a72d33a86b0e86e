"""Each client's training samples of each class: a picture and a table."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure


def write_csv(path: Path, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Write a line a client: its samples of each class."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["client", *classes, "samples"])
        for client, row in enumerate(counts):
            writer.writerow([client, *row, sum(row)])


def draw(path: Path, title: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Draw a bar a client, in which each class has its colour."""
    clients = range(len(counts))
    figure = Figure(figsize=(8, 1.2 + 0.4 * max(len(counts), 4)))
    axes = figure.subplots()
    colours = colormaps["tab20" if len(classes) <= 20 else "turbo"].resampled(len(classes))
    left = [0] * len(counts)
    for index, name in enumerate(classes):
        widths = [row[index] for row in counts]
        axes.barh(clients, widths, left=left, color=colours(index), label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(clients, [f"client {k}" for k in clients])
    axes.invert_yaxis()
    axes.set_xlabel("training samples")
    axes.set_title(title, loc="left")
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(classes) // 16, frameon=False
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
