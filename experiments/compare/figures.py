"""The figures of a comparison; lines and bars can be told apart in grey."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.compare.results import ALL, last_rounds, of_cell, training_bytes
from experiments.compare.study import NO_CUT, NONE, Cell, Study
from sfl.interactive.drawing import (
    STYLES,
    bar_style,
    count_rounds,
    draw_line,
    line_style,
    name_axes,
    one_legend,
    styled,
)
from sfl.strategy.schemes import SCHEMES

ORDER = ("central", "fl", "sl", "sflv1", "sflv2", "sflv3", "sync-sgd")  # of styles, and of drawing
MOST_CLIENTS = len(STYLES)  # of whom each has its line and its name


def draw_all(study: Study, lines: pd.DataFrame) -> list[Path]:
    """Draw every figure of a study, and return their paths."""
    with styled():
        return _draw_all(study, lines)


def _draw_all(study: Study, lines: pd.DataFrame) -> list[Path]:
    out = study.node.out_path
    overall, clients = lines[lines["client"] == ALL], lines[lines["client"] != ALL]
    paths = [
        _grid(out / "rounds.png", study, lambda axes, p: _by_round(axes, study, overall, p), 2),
        _final(out / "final.png", study, overall),
    ]
    if all(SCHEMES[name].pooled for name in study.schemes):
        return paths  # no clients
    for cost in ("bytes", "flops"):

        def draw(panels: Sequence[Axes], partition: str, cost: str = cost) -> None:
            _against(panels[0], study, clients, overall, partition, cost)

        paths.append(_grid(out / f"{cost}.png", study, draw, 1))
    for index, partition in enumerate(study.partitions):
        paths.append(_of_clients(out / f"clients_{index}.png", study, clients, partition))
    return paths


class Look(NamedTuple):
    """How the lines and bars of a cell are drawn, alike in every panel."""

    label: str
    style: dict[str, Any]
    bar: dict[str, Any]


def looks(study: Study) -> dict[Cell, Look]:
    """Return the look of each cell, in the order in which they are drawn.

    The first cell of a scheme has the scheme's own style, in every study; further ones, cut in
    other places, have what is left.
    """
    order = [*ORDER, *(name for name in study.schemes if name not in ORDER)]
    cells = sorted(study.cells, key=lambda cell: order.index(cell.scheme))
    kinds = list(dict.fromkeys(cell._replace(partition="") for cell in cells))
    first = {kind.scheme: kind for kind in reversed(kinds)}
    styles = {kind: order.index(scheme) for scheme, kind in first.items()}
    free = iter(sorted(set(range(len(order) + len(kinds))) - {*styles.values()}))
    for kind in kinds:
        if kind not in styles:
            styles[kind] = next(free)
    placed = {kind[2:4] for kind in kinds if kind.cut != NO_CUT}
    return {cell: _look(cell, styles[cell._replace(partition="")], len(placed)) for cell in cells}


def _look(cell: Cell, number: int, num_placed: int) -> Look:
    is_named = num_placed > 1 and cell.cut != NO_CUT
    label = f"{cell.scheme}, {cell.topology} {cell.cut}" if is_named else cell.scheme
    label += f", {cell.swept}" if cell.swept != NONE else ""
    return Look(label, line_style(number), bar_style(number))


def _title(study: Study, spread: str = "range") -> str:
    run, count = study.run, len(study.seeds)
    seeds = f"mean and {spread} of {count} seeds" if count > 1 else f"seed {run.seed}"
    return f"{run.model} on {run.dataset}, {run.clients} clients, {seeds}"


def _grid(
    path: Path, study: Study, draw: Callable[[Sequence[Axes], str], None], columns: int
) -> Path:
    """Draw a row of panels a partition, with one legend for all."""
    rows = len(study.partitions)
    size = 5.2 * columns + 1.6, 3.6 * rows + 0.4
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, partition in zip(panels, study.partitions, strict=True):
        draw(axes, partition)
        axes[0].set_title(partition, loc="left", fontsize=10)
    one_legend(figure, figure.axes)
    figure.suptitle(_title(study), fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def _plot(axes: Axes, x: Any, by_seed: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    """Draw the mean over seeds, and a band from the lowest to the highest."""
    known = by_seed.notna().all(axis=1).to_numpy()  # a client may sit rounds out
    x, by_seed = x[known], by_seed[known]
    spread = (by_seed.min(axis=1), by_seed.max(axis=1)) if by_seed.shape[1] > 1 else None
    draw_line(axes, x, by_seed.mean(axis=1), style, label=label, band=spread)


def _by_round(panels: Sequence[Axes], study: Study, overall: pd.DataFrame, partition: str) -> None:
    for axes, metric, title in zip(
        panels,
        ("val_acc", "train_loss"),
        ("validation accuracy", "training loss (nats)"),
        strict=True,
    ):
        for cell, look in looks(study).items():
            if cell.partition == partition:
                by_seed = of_cell(overall, cell).pivot(index="round", columns="seed", values=metric)
                _plot(axes, by_seed.index + 1, by_seed, look.label, look.style)
        name_axes(axes, "round", title)
        count_rounds(axes)


def _against(
    axes: Axes,
    study: Study,
    clients: pd.DataFrame,
    overall: pd.DataFrame,
    partition: str,
    cost: str,
) -> None:
    """Draw validation accuracy against what a client has spent until then, the mean client's."""
    for cell, look in looks(study).items():
        if cell.partition != partition or SCHEMES[cell.scheme].pooled:  # which has no clients
            continue
        of_clients = of_cell(clients, cell)
        spent = (
            (training_bytes(of_clients, "up") + training_bytes(of_clients, "down")) / 1e6
            if cost == "bytes"
            else of_clients["client_gflops"] / 1e3
        )
        a_round = spent.groupby(of_clients["round"]).sum() / (
            of_clients["client"].nunique() * of_clients["seed"].nunique()
        )
        by_seed = of_cell(overall, cell).pivot(index="round", columns="seed", values="val_acc")
        _plot(axes, a_round.cumsum(), by_seed, look.label, look.style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    name_axes(
        axes,
        {"bytes": "MB a client, training, up and down", "flops": "TFLOPs a client, training"}[cost],
        "validation accuracy",
    )


def _final(path: Path, study: Study, overall: pd.DataFrame) -> Path:
    """Draw the last round's test accuracies, and the balanced ones, a group a partition."""
    last = last_rounds(overall)  # of each run: --stop-when may end some earlier
    figure = Figure(figsize=(4.5 + 2.2 * len(study.partitions), 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    groups = [
        [(cell, look) for cell, look in looks(study).items() if cell.partition == partition]
        for partition in study.partitions
    ]
    width = 0.8 / max(map(len, groups))
    for axes, metric, title in zip(
        panels,
        ("test_acc", "test_balanced_acc"),
        ("test accuracy", "balanced test accuracy"),
        strict=True,
    ):
        for number, group in enumerate(groups):
            for index, (cell, look) in enumerate(group):
                values = of_cell(last, cell)[metric].dropna()
                if values.empty:
                    continue
                place = number + (index - (len(group) - 1) / 2) * width
                axes.bar(
                    place, values.mean(), width * 0.95, label=look.label, **look.bar,
                    yerr=values.std(ddof=1) if len(values) > 1 else None, capsize=3,
                )  # fmt: skip
                axes.annotate(
                    f"{values.mean():.3f}", (place, 0.03), xycoords=("data", "axes fraction"),
                    ha="center", va="bottom", fontsize=8, rotation=90,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                )  # fmt: skip
        long = max(map(len, study.partitions)) > 18
        turned = {"rotation": 20, "ha": "right"} if long else {}
        axes.set_xticks(range(len(study.partitions)), study.partitions, **turned)
        axes.set_title(title, loc="left", fontsize=10)
    lowest = last[["test_acc", "test_balanced_acc"]].min().min()
    highest = last[["test_acc", "test_balanced_acc"]].max().max()
    margin = max(0.25 * (highest - lowest), 0.02)
    panels[0].set_ylim(max(0, lowest - 2 * margin), min(1.02, highest + margin))
    panels[0].set_ylabel("share (the axis does not begin at 0)")
    one_legend(figure, figure.axes)
    figure.suptitle(f"{_title(study, 'standard deviation')}, last round", fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def _of_clients(path: Path, study: Study, clients: pd.DataFrame, partition: str) -> Path:
    """Draw each client's validation accuracy and training loss by round, a column a cell."""
    shown = {
        cell: look.label
        for cell, look in looks(study).items()
        if cell.partition == partition and not SCHEMES[cell.scheme].pooled
    }
    metrics = {"val_acc": "validation accuracy", "train_loss": "training loss (nats)"}
    figure = Figure(figsize=(3.4 * len(shown) + 1.4, 6), layout="constrained")
    panels = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
    for row, (metric, title) in zip(panels, metrics.items(), strict=True):
        for axes, cell in zip(row, shown, strict=True):
            own = of_cell(clients, cell)
            ids = sorted(own["client"].unique(), key=int)
            many = len(ids) > MOST_CLIENTS
            for client in ids:
                by_seed = own[own["client"] == client].pivot(
                    index="round", columns="seed", values=metric
                )
                if many:
                    axes.plot(by_seed.index + 1, by_seed.mean(axis=1), color="#999999", lw=0.6)
                else:
                    style = STYLES[int(client) % len(STYLES)]
                    _plot(axes, by_seed.index + 1, by_seed, f"client {client}", style)
            if many:
                mean = own.pivot_table(index="round", columns="seed", values=metric)
                _plot(axes, mean.index + 1, mean, f"mean of {len(ids)} clients", STYLES[0])
            name_axes(
                axes, "round" if metric == "train_loss" else "", title if axes is row[0] else ""
            )
            count_rounds(axes)
            if metric == "val_acc":
                axes.set_title(shown[cell], loc="left", fontsize=10)
    one_legend(figure, figure.axes)
    figure.suptitle(f"{_title(study)}, {partition}", fontsize=10)
    figure.savefig(path, dpi=130)
    return path
