"""Predictions of the test set: a table of the classes, confusion matrix, ROC and other curves."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.metrics import (
    auc,
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

import sfl.archive
from experiments.predictions.reading import Predictions, read_predictions
from sfl.errors import RunError
from sfl.interactive.drawing import STYLES, styled
from sfl.tracking.pictures import DPI, MOST_NAMED, confusion_figure

Points = tuple[np.ndarray, np.ndarray, float]  # x, y, the area


def write_classes(path: Path, predictions: Predictions) -> None:
    """Write a line a class: samples, precision, recall, F1, areas under both curves."""
    y, p, classes = predictions
    indices = range(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        y, p.argmax(1), labels=list(indices), zero_division=0
    )
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["class", "samples", "precision", "recall", "f1", "roc_auc", "average_precision"]
        )
        for k in indices:
            both = 0 < support[k] < len(y)
            areas = [
                f(y == k, p[:, k]) if both else "" for f in (roc_auc_score, average_precision_score)
            ]
            writer.writerow([classes[k], support[k], precision[k], recall[k], f1[k], *areas])


def draw_confusion(path: Path, title: str, predictions: Predictions) -> None:
    """Draw which share of each class is taken for which, with the counts if there is room."""
    y, p, classes = predictions
    counts = confusion_matrix(y, p.argmax(1), labels=range(len(classes)))
    confusion_figure(counts, classes, title).savefig(path, dpi=DPI)


class CurveKind(NamedTuple):
    """A curve of one class against all others: its points, and the words beside it."""

    points: Callable[[np.ndarray, np.ndarray], Points]  # of (N,) bool, (N,) float64
    x: str
    y: str
    area: str


def _roc(y: np.ndarray, p: np.ndarray) -> Points:
    wrong, right, _ = roc_curve(y, p)
    return wrong, right, auc(wrong, right)


def _precision_recall(y: np.ndarray, p: np.ndarray) -> Points:
    precision, recall, _ = precision_recall_curve(y, p)
    return recall, precision, average_precision_score(y, p)


ROC = CurveKind(_roc, "share of the others taken for the class", "share of the class found", "area")
PRECISION_RECALL = CurveKind(_precision_recall, "recall", "precision", "average precision")


def draw_curves(path: Path, title: str, predictions: Predictions, kind: CurveKind) -> None:
    """Draw a curve for each class against all others, and one over all decisions together.

    Of many classes only those with the lowest areas are named.
    """
    y, p, classes = predictions
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    found = []
    for k, name in enumerate(classes):
        if 0 < (y == k).sum() < len(y):
            found.append((name, *kind.points(y == k, p[:, k])))
    found.sort(key=lambda of_class: of_class[3])
    colours = colormaps["viridis"].resampled(max(len(found), 2))
    for index, (name, xs, ys, area) in enumerate(found):
        shown = index < MOST_NAMED
        axes.plot(
            xs, ys, color=colours(index), lw=1.2,
            linestyle=STYLES[index % len(STYLES)]["linestyle"],
            label=f"{name} ({area:.3f})" if shown else None,
        )  # fmt: skip
    one_hot = np.eye(p.shape[1], dtype=bool)[y]
    xs, ys, area = kind.points(one_hot.ravel(), p.ravel())
    axes.plot(xs, ys, color="black", lw=2.4, label=f"all decisions ({area:.3f})")
    left_out = len(found) - MOST_NAMED
    heading = f"class ({kind.area})" + (f", the lowest {MOST_NAMED}" if left_out > 0 else "")
    axes.legend(
        title=heading, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8
    )
    axes.set(xlabel=kind.x, ylabel=kind.y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.grid(alpha=0.3)
    axes.set_title(title, loc="left", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_all(
    run_dir: Path, client_folders: Sequence[Path] = (), allow_import: str = ""
) -> list[Path]:
    """Write the table and the pictures of a run into its folder, and return their paths."""
    predictions = read_predictions(run_dir, client_folders, allow_import)
    if np.isnan(predictions.probabilities).any():
        raise RunError(f"{run_dir}: the run diverged: its predictions are no numbers")
    config = sfl.archive.open(run_dir).config()
    about = ("scheme", "model", "dataset", "partition", "rounds", "seed")
    title = ", ".join(f"{name} {config[name]}" for name in about)
    table, confusion, roc, precision_recall = paths = [
        run_dir / f for f in ("classes.csv", "confusion.png", "roc.png", "precision_recall.png")
    ]
    write_classes(table, predictions)
    with styled():
        draw_confusion(confusion, title, predictions)
        draw_curves(roc, title, predictions, ROC)
        draw_curves(precision_recall, title, predictions, PRECISION_RECALL)
    return paths
