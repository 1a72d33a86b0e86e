"""Pictures of a run's figures, which trackers show; drawn without a display."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sfl.tracking.tracked import TrackedRound

Array = np.ndarray[Any, Any]
MOST_NAMED = 20  # classes whose counts are written into the picture
DPI = 130  # dots an inch


def confusion_figure(counts: Array, classes: Sequence[str], title: str) -> Figure:
    """Draw which share of each class is taken for which, with the counts if there is room.

    ``counts``: (classes, classes) by class and by what its samples are taken for.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4 + 0.45 * len(classes), 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class", shrink=0.8)
    ticks = range(len(classes))
    small = 8 if len(classes) <= MOST_NAMED else 5
    axes.set_xticks(ticks, classes, rotation=90, fontsize=small)
    axes.set_yticks(ticks, classes, fontsize=small)
    if len(classes) <= MOST_NAMED:
        for row in ticks:
            for column in ticks:
                shade = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(title, loc="left", fontsize=9)
    return figure


def confusion_pixels(done: TrackedRound, classes: Sequence[str]) -> Array | None:
    """Return the confusion matrix of a round's test set: (height, width, 4) uint8; None without."""
    if done.confusion is None:
        return None
    title = f"test set after round {done.index + 1}"
    figure = confusion_figure(done.confusion.numpy(), classes, title)
    figure.set_dpi(DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
