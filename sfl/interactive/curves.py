"""Curves of runs by round, several in one picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from sfl.interactive.drawing import count_rounds, draw_line, line_style, name_axes, styled


def by_seed(runs: Sequence[pd.DataFrame], column: str) -> pd.DataFrame:
    """Return a figure of runs that differ in their seeds: a row for each round that all have."""
    columns = [rounds.set_index("round")[column] for rounds in runs]
    table = pd.concat(columns, axis=1, keys=range(len(columns)), join="inner")
    return table.replace([float("inf"), -float("inf")], float("nan")).dropna()


def draw_rounds(axes: Axes, table: pd.DataFrame, number: int, **how: Any) -> None:
    """Draw mean and standard deviation over the seeds; ``number``: of the line's style."""
    mean, std = table.mean(axis=1), table.std(axis=1, ddof=1)
    band = (mean - std, mean + std) if table.shape[1] > 1 else None
    label = how.pop("label", "")
    draw_line(axes, table.index + 1, mean, line_style(number) | how, label=label, band=band)
    count_rounds(axes)


def draw(runs: Mapping[str, pd.DataFrame], metric: str, title: str) -> Any:
    """Draw the loss and a metric by round of each run, by its label; return the two axes.

    Solid: in training; dashed: of the validation samples.
    """
    with styled():
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axis, name, text in zip(axes, ("loss", metric), ("loss", title), strict=True):
            for number, (label, rounds) in enumerate(runs.items()):
                for part, line, of in (("train", "-", "training"), ("val", "--", "validation")):
                    told = f"{label}, {of}" if len(runs) > 1 else of
                    table = by_seed([rounds], f"{part}_{name}")
                    draw_rounds(axis, table, number, label=told, linestyle=line, lw=1.5)
            name_axes(axis, "round", text)
            axis.legend(fontsize=8)
        if len(runs) == 1:
            figure.suptitle(next(iter(runs)))
    return axes
