"""Curves of runs by round, several in one picture."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

MARKERS = "osD^vP*X"  # so that runs can be told apart in grey


def draw(runs: Mapping[str, pd.DataFrame], metric: str, title: str) -> Any:
    """Draw the loss and a metric by round of each run, by its label; return the two axes.

    Solid: in training; dashed: of the validation samples.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, text in zip(axes, ("loss", metric), ("loss", title), strict=True):
        for index, (label, rounds) in enumerate(runs.items()):
            marker, colour = MARKERS[index % len(MARKERS)], f"C{index % 10}"
            for part, line, of in (("train", "-", "training"), ("val", "--", "validation")):
                values = rounds[f"{part}_{name}"]
                axis.plot(
                    rounds["round"] + 1, values, line, marker=marker, markersize=4, color=colour,
                    label=f"{label}, {of}" if len(runs) > 1 else of,
                )  # fmt: skip
        axis.set(xlabel="round", ylabel=text)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    return axes
