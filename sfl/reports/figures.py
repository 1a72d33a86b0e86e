"""The figures of a report: each as wide as a column, or the screen of a telephone."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sfl.interactive.curves import by_seed, draw_rounds
from sfl.interactive.drawing import (
    bar_style,
    count_rounds,
    draw_line,
    line_style,
    name_axes,
    one_legend,
)
from sfl.interactive.run import Run
from sfl.reports.gathered import Confusion, Group, shown_metric
from sfl.reports.tables import TIMES, a_client, a_round, kinds
from sfl.tracking.pictures import confusion_figure

WIDTH = 5.2  # inches
MOST_CLIENTS = 8  # that have a line each
MOST_ROWS = 40  # clients in the picture of a round
PARTS = {"train": "training", "val": "validation", "test": "test"}


class Picture(NamedTuple):
    """A figure, with the name of its file and what it shows."""

    name: str
    caption: str
    figure: Figure


def _new(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _columns(labels: Sequence[str]) -> int:
    """Return how many labels there is room for beside each other."""
    return max(1, 60 // (max(map(len, labels)) + 8))


def _legend_height(labels: Sequence[str]) -> float:
    """Return about how many inches a legend takes."""
    return 0.2 * -(-len(labels) // _columns(labels))


def _legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend below, where long labels have room."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = _columns(labels)
        wrapped = [_wrapped(label, 70 // columns) for label in labels]
        figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, fontsize=8)


def curves(groups: Sequence[Group]) -> Iterator[Picture]:
    """Yield loss and metric by round: a line a group, and a band of its standard deviation."""
    metric, title = shown_metric(groups[0].first)
    for name, text in {"loss": "loss", metric: title}.items():
        for part, of in PARTS.items():
            column = f"{part}_{name}"
            tables = [_of_group(group, column) for group in groups]
            fewest = 2 if part == "test" else 1  # a single test is in the tables
            if not any(len(table) >= fewest for table in tables):
                continue
            figure, axes = _new(3.2 + _legend_height([group.label for group in groups]))
            for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
                draw_rounds(axes, table, number, label=group.label)
            name_axes(axes, "round", f"{of} {text}")
            _legend(figure, axes)
            yield Picture(column, f"{of} {text} by round", figure)


def _of_group(group: Group, column: str) -> pd.DataFrame:
    runs = [run.rounds for run in group.runs]
    there = all(column in rounds and len(rounds) for rounds in runs)
    return by_seed(runs, column) if there else pd.DataFrame()


def of_clients(group: Group, name: str) -> Iterator[Picture]:
    """Yield loss and metric of each client by round, in the first run of a group."""
    run, (metric, title) = group.first, shown_metric(group.first)
    if len(run.client_ids) < 2 or run.clients.empty:
        return
    trained = run.steps.groupby(["round", "client"])["loss"].mean() if len(run.steps) else None
    if trained is not None:
        table = trained.unstack("client")
        yield _of_clients(table, f"{name}_loss", "training loss", group.label)
    if f"val_{metric}" in run.clients:
        table = run.clients.pivot(index="round", columns="client", values=f"val_{metric}")
        yield _of_clients(table, f"{name}_{metric}", f"validation {title}", group.label)


def _of_clients(table: pd.DataFrame, name: str, what: str, label: str) -> Picture:
    """Draw a line a client, or of many the mean client among thin lines."""
    table = table.replace([np.inf, -np.inf], np.nan)
    figure, axes = _new(3.5)
    many = table.shape[1] > MOST_CLIENTS
    for number, client in enumerate(table.columns):
        values = table[client].dropna()  # who sits a round out has no point there
        if many:
            axes.plot(values.index + 1, values, color="#999999", lw=0.6)
        else:
            told = f"client {client}"
            draw_line(axes, values.index + 1, values, line_style(number), label=told)
    if many:
        mean = table.mean(axis=1)
        told = f"mean of {table.shape[1]} clients"
        draw_line(axes, mean.index + 1, mean, line_style(0), label=told)
    count_rounds(axes)
    name_axes(axes, "round", what)
    axes.set_title(_wrapped(label, 60), loc="left", fontsize=9)
    _legend(figure, axes)
    return Picture(name, f"{what} of each client: {label}", figure)


def _stacked(rows: Mapping[str, Mapping[str, float]], unit: str) -> Figure | None:
    """Draw a bar a row, made of parts that have a look each, with the sum behind it."""
    parts = {name: None for row in rows.values() for name, value in row.items() if value > 0}
    if not parts:
        return None
    labels = [_wrapped(label, 30) for label in rows]
    lines = sum(label.count("\n") + 2 for label in labels)
    figure, axes = _new(1.1 + 0.17 * lines + _legend_height([*parts]))
    left = np.zeros(len(rows))
    for number, part in enumerate(parts):
        widths = np.array([max(row.get(part, 0.0), 0.0) for row in rows.values()])
        axes.barh(range(len(rows)), widths, 0.62, left=left, label=part, **bar_style(number))
        left += widths
    for place, total in enumerate(left):
        axes.annotate(
            f" {total:,.2f}", (total, place), va="center", fontsize=8, annotation_clip=False
        )
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left.max(), 1e-9) * 1.16)
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def costs(groups: Sequence[Group]) -> Iterator[Picture]:
    """Yield the bytes of a round by content and link, and the seconds of a client in it."""
    several = len(groups) > 1
    moved: dict[str, dict[str, float]] = {}
    for group in groups:
        for way in ("up", "down"):
            names = {n: t for n, t in kinds(group.first).items() if n.startswith(f"bytes_{way}_")}
            parts = {
                title.replace(f" {way}", ""): _mean(a_round(run, name) for run in group.runs) / 1e6
                for name, title in names.items()
            }
            moved[f"{group.label}, {way}" if several else way] = parts
    if figure := _stacked(moved, "MB in a round, all clients"):
        yield Picture("bytes", "bytes of a round, up to the server and down from it", figure)
    spent = {
        group.label: {
            title: _mean(a_client(run, name) for run in group.runs)
            for name, title in TIMES.items()
            if name != "server_compute_s"  # the client waits meanwhile
        }
        for group in groups
    }
    if figure := _stacked(spent if several else {"": spent[groups[0].label]}, "seconds"):
        yield Picture("seconds", "seconds of a round for one client, on average", figure)


def _mean(values: Any) -> float:
    series = pd.Series(list(values), dtype=float)
    return float(series.mean()) if series.notna().any() else 0.0


def typical_round(run: Run) -> int | None:
    """Return the round whose duration is the median, of those in which spans are recorded."""
    if "training_start_s" not in run.clients:
        return None
    known = run.clients.dropna(subset=["training_start_s"])["round"].unique()
    rows = run.rounds[run.rounds["round"].isin(known)].sort_values(["seconds", "round"])
    return None if rows.empty else int(rows["round"].iloc[len(rows) // 2])


def gantt(group: Group, name: str) -> Picture | None:
    """Draw who waited for whom in a typical round of the first run of a group."""
    run = group.first
    if (round_index := typical_round(run)) is None:
        return None
    whole = float(run.rounds.set_index("round")["seconds"][round_index])
    rows = run.clients[run.clients["round"] == round_index].head(MOST_ROWS)
    figure, axes = _new(1.5 + 0.24 * len(rows))
    for place, row in enumerate(rows.to_dict("records")):
        for title, style, start, end in _spans(row, whole):
            axes.barh(place, end - start, 0.7, left=start, label=title, **style)
    axes.axvline(whole, color="black", lw=1.2, linestyle=":", label="end of the round")
    axes.set_yticks(range(len(rows)), [f"client {k}" for k in rows["client"]], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, whole * 1.02)
    axes.set_xlabel("seconds since the round began")
    left_out = len(run.client_ids) - len(rows)
    more = f", the first {MOST_ROWS} of {len(run.client_ids)} clients" if left_out > 0 else ""
    axes.set_title(_wrapped(f"{group.label}{more}", 60), loc="left", fontsize=9)
    one_legend(figure, [axes], loc="outside lower center", ncols=2, fontsize=8)
    caption = f"who waited for whom in round {round_index + 1} of {run.config.rounds}"
    return Picture(name, f"{caption}: {group.label}", figure)


Span = tuple[str, dict[str, Any], float, float]  # title, look, start and end
WAITING = {"color": "white", "edgecolor": "#999999", "lw": 0.6}


def _spans(row: Mapping[Any, Any], whole: float) -> Iterator[Span]:
    """Yield what a client did in a round.

    Of one that came back and trained again, the phases overlap, and there is no wait between.
    """
    phases = (("training", bar_style(1)), ("evaluation", bar_style(2)))
    at = 0.0
    for phase, style in phases:
        start, end = row.get(f"{phase}_start_s"), row.get(f"{phase}_end_s")
        if start is None or end is None or not np.isfinite([start, end]).all():
            continue
        if start > at:
            yield "waiting for others", WAITING, at, start
        yield phase, style, start, end
        at = max(at, end)
    if 0 < at < whole:
        yield "waiting for others", WAITING, at, whole


def confusions(groups: Sequence[Group], found: Mapping[str, Confusion]) -> Iterator[Picture]:
    """Yield the confusion of each group that has one."""
    for number, group in enumerate(groups):
        if group.label in found:
            caption = f"test samples of each class, and what they are taken for: {group.label}"
            counts, classes = found[group.label].counts, found[group.label].classes
            figure = confusion_figure(counts, classes, group.label, WIDTH)
            yield Picture(f"confusion_{number}", caption, figure)
