"""Draw a run's curves: training loss and validation accuracy, a client and round.

python -m experiments.curves RUN_DIR
"""

import sys
from collections import defaultdict
from pathlib import Path

from sfl.cli import run_program

MARKERS = "osD^vP*X"


def draw_curves(run_dir: Path) -> Path:
    """Write ``curves.png`` into a run's folder and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    from sfl.archive import reader as archive
    from sfl.archive.round_log import read_round

    opened = archive.open(run_dir)
    logs = sorted((e for e in opened.listed if e.kind == archive.ROUND_LOG), key=lambda e: e.round)
    # client -> metric -> round -> value; a client that sat a round out has no loss there
    curves: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in logs:
        figures = read_round(opened.read(entry.path))
        losses = defaultdict(list)
        for (client, _, metric), value in figures.items():
            if metric == "loss":
                losses[client].append(value)
            elif metric == "val_acc":
                curves[client][metric][entry.round + 1] = value
        for client, values in losses.items():
            curves[client]["loss"][entry.round + 1] = sum(values) / len(values)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"loss": "training loss (mean of the round's steps)", "val_acc": "validation accuracy"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for client, values in sorted(curves.items()):
            if of_metric := values[metric]:
                style = {"marker": MARKERS[client % len(MARKERS)], "markersize": 4, "alpha": 0.8}
                axis.plot(*zip(*of_metric.items(), strict=True), label=f"client {client}", **style)
        axis.set(xlabel="round", ylabel=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    config = opened.config()
    about = ("scheme", "model", "dataset", "partition", "optimizer", "lr", "batch_size", "seed")
    figure.suptitle(", ".join(f"{name} {config[name]}" for name in about), fontsize=9)
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main() -> None:
    from sfl.options import Parser

    parser = Parser(prog="python -m experiments.curves", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    print(draw_curves(parser.parse_args().run_dir))


if __name__ == "__main__":
    sys.exit(run_program("curves", main))
