"""Draw which client has how many training samples of which class, and write it as CSV.

python -m experiments.partition [run options] [--data-dir DIR]

Writes ``partition.png`` and ``partition.csv`` into ``--out``: of each client's part, before a fifth
of it is held out for validation.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from sfl.cli import run_program


def write_csv(path: Path, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Write a line a client: its samples of each class."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["client", *classes, "samples"])
        for client, row in enumerate(counts):
            writer.writerow([client, *row, sum(row)])


def draw(path: Path, title: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Draw a bar a client, in which each class has its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clients = range(len(counts))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * max(len(counts), 4)))
    colours = pyplot.get_cmap("tab20" if len(classes) <= 20 else "turbo", len(classes))
    left = [0] * len(counts)
    for index, name in enumerate(classes):
        widths = [row[index] for row in counts]
        axes.barh(clients, widths, left=left, color=colours(index), label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(clients, [f"client {k}" for k in clients])
    axes.invert_yaxis()
    axes.set_xlabel("training samples")
    axes.set_title(title, loc="left")
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(classes) // 16, frameon=False
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    import torch

    from sfl.archive.run_folder import say
    from sfl.config import RunConfig
    from sfl.data.client_data import Source
    from sfl.data.datasets import dataset_of
    from sfl.data.partition import OWN, check_partition, partition
    from sfl.errors import ConfigError
    from sfl.nodes import NodeConfig
    from sfl.options import parse_options

    prog = "python -m experiments.partition"
    about = "Draw which client has how many training samples of which class."
    run, node = parse_options(None, RunConfig, NodeConfig, prog=prog, about=about)
    check_partition(run)
    if run.partition == OWN:
        raise ConfigError(
            "--partition own: each client's data are its own; there is nothing to deal"
        )
    spec = dataset_of(run)
    train, _ = spec.load(Source(node.data_path, node.cache_path, spec.input_shape, say))
    num_classes = len(spec.classes)
    parts = partition(train, run)
    counts = [torch.bincount(train.y[part], minlength=num_classes).tolist() for part in parts]
    node.out_path.mkdir(parents=True, exist_ok=True)
    write_csv(node.out_path / "partition.csv", spec.classes, counts)
    title = f"{run.dataset}, {run.partition}, seed {run.seed}"
    draw(node.out_path / "partition.png", title, spec.classes, counts)
    for client, row in enumerate(counts):
        print(f"client {client}: {sum(row)} samples of {sum(map(bool, row))} classes")
    print(f"drawn in {node.out_path / 'partition.png'}")


if __name__ == "__main__":
    sys.exit(run_program("partition", main))
