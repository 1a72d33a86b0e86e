"""What a run's model takes its test set for: confusion matrix, ROC and precision-recall curves.

python -m experiments.predictions RUN_DIR [--clients FOLDER ...]

Reads the labels and logits that were kept after the last round: by the server, or, where clients
hold the whole model, in their own folders, which are found beside the server's if they are on this
machine. Writes ``confusion.png``, ``roc.png``, ``precision_recall.png`` and ``classes.csv`` into
RUN_DIR.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sfl.archive
from sfl.archive.layout import MANIFEST
from sfl.cli import run_program

if TYPE_CHECKING:
    import numpy as np

MOST_NAMED = 20  # classes that are told apart by name
DASHES = ("-", "--", "-.", ":")


def read_predictions(
    run_dir: Path, client_folders: Sequence[Path] = ()
) -> "tuple[np.ndarray, np.ndarray, list[str]]":
    """Return labels (N,), probabilities (N, classes) and class names of the last round's test.

    Raises:
        RunError: predictions are missing.
        IntegrityError: a file is damaged.
    """
    import torch

    from sfl.archive.layout import PREDICTIONS, model_path
    from sfl.errors import RunError
    from sfl.files.torch_file import TensorSpec

    run = sfl.archive.open(run_dir)
    data, last = run.environment()["data"], int(run.config()["rounds"]) - 1
    beside = run_dir.resolve().parent.parent / "client" / run_dir.resolve().name
    holders = [run_dir, *client_folders, *sorted(beside.glob("client_*"))]
    archives = [sfl.archive.open(f) for f in holders if (f / MANIFEST).is_file()]
    labels, probabilities, missing = [], [], []
    for client, counts in data["num_samples"].items():
        path, count = model_path(PREDICTIONS, last, client=client), counts["test"]
        holder = next((archive for archive in archives if archive.lists(path)), None)
        if holder is None:
            missing += [f"client_{client}"] if count else []
            continue
        spec = {
            "labels": TensorSpec((count,), torch.int64),
            "logits": TensorSpec((count, len(data["classes"])), torch.float32),
        }
        both = holder.state(path, spec)
        labels.append(both["labels"])
        probabilities.append(both["logits"].double().softmax(1))
    if missing or not labels:
        raise RunError(
            f"no predictions of {', '.join(missing) or 'any client'} after round {last + 1}: where"
            " clients hold the whole model, give their folders with --clients"
        )
    return torch.cat(labels).numpy(), torch.cat(probabilities).numpy(), data["classes"]


def write_classes(path: Path, y: "np.ndarray", p: "np.ndarray", classes: Sequence[str]) -> None:
    """Write a line a class: samples, precision, recall, F1, areas under both curves."""
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_fscore_support,
        roc_auc_score,
    )

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


def draw_confusion(
    path: Path, title: str, y: "np.ndarray", p: "np.ndarray", classes: Sequence[str]
) -> None:
    """Draw which share of each class is taken for which, with the counts if there is room."""
    import numpy as np
    from matplotlib import pyplot
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(y, p.argmax(1), labels=range(len(classes)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4 + 0.45 * len(classes), 16)
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
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
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _roc(y: "np.ndarray", p: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, float]":
    from sklearn.metrics import auc, roc_curve

    wrong, right, _ = roc_curve(y, p)
    return wrong, right, auc(wrong, right)


def _precision_recall(y: "np.ndarray", p: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, float]":
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(y, p)
    return recall, precision, average_precision_score(y, p)


def draw_curves(
    path: Path,
    title: str,
    y: "np.ndarray",
    p: "np.ndarray",
    classes: Sequence[str],
    curve: "Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, float]]",
    labels: tuple[str, str, str],
) -> None:
    """Draw a curve for each class against all others, and one over all decisions together.

    ``labels``: of the axes, and of the area. Of many classes only the lowest areas are named.
    """
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    found = []
    for k, name in enumerate(classes):
        if 0 < (y == k).sum() < len(y):
            found.append((name, *curve(y == k, p[:, k])))
    found.sort(key=lambda of_class: of_class[3])
    colours = pyplot.get_cmap("viridis", max(len(found), 2))
    for index, (name, xs, ys, area) in enumerate(found):
        shown = index < MOST_NAMED
        axes.plot(
            xs, ys, color=colours(index), linestyle=DASHES[index % len(DASHES)], lw=1.2,
            label=f"{name} ({area:.3f})" if shown else None,
        )  # fmt: skip
    one_hot = np.eye(p.shape[1], dtype=bool)[y]
    xs, ys, area = curve(one_hot.ravel(), p.ravel())
    axes.plot(xs, ys, color="black", lw=2.4, label=f"all decisions ({area:.3f})")
    left_out = len(found) - MOST_NAMED
    heading = f"class ({labels[2]})" + (f", the lowest {MOST_NAMED}" if left_out > 0 else "")
    axes.legend(
        title=heading, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8
    )
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.grid(alpha=0.3)
    axes.set_title(title, loc="left", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_all(run_dir: Path, client_folders: Sequence[Path] = ()) -> list[Path]:
    """Write the table and the pictures of a run into its folder, and return their paths."""
    import matplotlib

    from sfl.errors import RunError

    matplotlib.use("Agg")
    y, p, classes = read_predictions(run_dir, client_folders)
    if not (p == p).all():
        raise RunError(f"{run_dir}: the run diverged: its predictions are no numbers")
    config = sfl.archive.open(run_dir).config()
    about = ("scheme", "model", "dataset", "partition", "rounds", "seed")
    title = ", ".join(f"{name} {config[name]}" for name in about)
    paths = [
        run_dir / f for f in ("classes.csv", "confusion.png", "roc.png", "precision_recall.png")
    ]
    write_classes(paths[0], y, p, classes)
    draw_confusion(paths[1], title, y, p, classes)
    roc = ("share of the others taken for the class", "share of the class found", "area")
    draw_curves(paths[2], title, y, p, classes, _roc, roc)
    both = ("recall", "precision", "average precision")
    draw_curves(paths[3], title, y, p, classes, _precision_recall, both)
    return paths


def main() -> None:
    from sfl.options import Parser

    parser = Parser(
        prog="python -m experiments.predictions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="shared_files/server/<run>")
    parser.add_argument(
        "--clients", metavar="FOLDER", type=Path, nargs="+", default=[],
        help="clients' folders, brought here from their machines",
    )  # fmt: skip
    options = parser.parse_args()
    for path in draw_all(options.run_dir, options.clients):
        print(path)


if __name__ == "__main__":
    sys.exit(run_program("predictions", main))
