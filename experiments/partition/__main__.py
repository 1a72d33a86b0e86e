"""Draw which client has how many training samples of which class, and write it as CSV.

python -m experiments.partition [run options] [--data-dir DIR]

Writes ``partition.png`` and ``partition.csv`` into ``--out``: of each client's part, before a fifth
of it is held out for validation.
"""

import sys

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.options import parse_options
from sfl.program import run_program


def main() -> None:
    prog = "python -m experiments.partition"
    about = "Draw which client has how many training samples of which class."
    run, node = parse_options(None, RunConfig, NodeConfig, prog=prog, about=about)
    import torch

    from experiments.partition.figure import draw, write_csv
    from sfl.archive.run_folder import say
    from sfl.data.client_data import Source
    from sfl.data.datasets import dataset_of
    from sfl.data.partition import OWN, check_partition, partition

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
