"""Pictures of a run's figures, which trackers show; drawn without a display."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from sfl.errors import shortened, told
from sfl.tracking.tracked import TrackedRound, TrackedRun

Array = np.ndarray[Any, Any]
MOST_NAMED = 20  # classes whose counts are written into the picture
DPI = 130  # dots an inch


def _drawable(text: str) -> str:
    """Return a text with "?" for each character that no font of ours has: others warn, or fail."""
    families = FontProperties().get_family()
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    has = {c: c.isprintable() and any(f.get_char_index(ord(c)) for f in fonts) for c in {*text}}
    return "".join(c if has[c] else "?" for c in text)


def confusion_figure(
    counts: Array, classes: Sequence[str], title: str, side: float = 0.0
) -> Figure:
    """Draw which share of each class is taken for which, with the counts if there is room.

    ``counts``: (classes, classes) by class and by what its samples are taken for; ``side``: inches,
    by default as the classes need.
    """
    shares, size = counts / np.maximum(counts.sum(1, keepdims=True), 1), len(classes)
    side = side or min(5 + 0.45 * size, 16)
    figure = Figure(figsize=(side, 0.88 * side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class", shrink=0.7)
    named = range(0, size, 1 + (size - 1) // 60)
    small = 8 if size <= MOST_NAMED else 4.5
    short = [_drawable(shortened(classes[k], 24)) for k in named]
    plain: dict[str, Any] = {"parse_math": False}  # names may have a $
    axes.set_xticks(named, short, rotation=90, fontsize=small, **plain)
    axes.set_yticks(named, short, fontsize=small, **plain)
    if size <= MOST_NAMED:
        for row, column in np.ndindex(size, size):
            shade = "white" if shares[row, column] > 0.5 else "black"
            how: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "color": shade}
            axes.text(column, row, str(counts[row, column]), **how)
    axes.set(xlabel="taken for", ylabel="class")
    wrapped = "\n".join(textwrap.wrap(_drawable(title), 60))
    axes.set_title(wrapped, loc="left", fontsize=9, **plain)
    return figure


def confusion_pixels(run: TrackedRun, done: TrackedRound) -> Array | None:
    """Return the confusion matrix of a round's test set: (height, width, 4) uint8; None without.

    A picture that cannot be drawn is said, and left out: the round's figures do not depend on it.
    """
    if done.confusion is None:
        return None
    title = f"test set after round {done.index + 1}"
    try:
        figure = confusion_figure(done.confusion.numpy(), run.classes, title)
        figure.set_dpi(DPI)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
    except Exception as error:  # noqa: BLE001 - of a library; the reason is said
        run.say(f"warning: --track: no picture of the {title}: {told(error)}")
        return None
    return np.asarray(canvas.buffer_rgba())
