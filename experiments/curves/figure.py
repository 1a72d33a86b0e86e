"""A run's curves: training loss and validation accuracy, by client and round."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import sfl.archive
from sfl.archive.manifest import ROUND_LOG
from sfl.archive.round_log import read_round

Curves = dict[int, dict[str, dict[int, float]]]  # client -> metric -> round -> value
MARKERS = "osD^vP*X"


def read_curves(run: sfl.archive.RunArchive) -> Curves:
    """Return the losses and accuracies of a run; who sat a round out has no loss there."""
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for entry in run.listed:
        if entry.kind != ROUND_LOG:
            continue
        losses = defaultdict(list)
        for (client, _, metric), value in read_round(run.read(entry.path)).items():
            if metric == "loss":
                losses[client].append(value)
            elif metric == "val_acc":
                curves[client][metric][entry.round + 1] = value
        for client, values in losses.items():
            curves[client]["loss"][entry.round + 1] = sum(values) / len(values)
    return curves


def draw_curves(run_dir: Path) -> Path:
    """Write ``curves.png`` into a run's folder and return its path."""
    run = sfl.archive.open(run_dir)
    curves = read_curves(run)
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"loss": "training loss (mean of the round's steps)", "val_acc": "validation accuracy"}
    for axis, (metric, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for client, values in sorted(curves.items()):
            if points := sorted(values[metric].items()):
                style = {"marker": MARKERS[client % len(MARKERS)], "markersize": 4, "alpha": 0.8}
                axis.plot(*zip(*points, strict=True), label=f"client {client}", **style)
        axis.set(xlabel="round", ylabel=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend()
    config = run.config()
    about = ("scheme", "model", "dataset", "partition", "optimizer", "lr", "batch_size", "seed")
    figure.suptitle(", ".join(f"{name} {config[name]}" for name in about), fontsize=9)
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    return path
