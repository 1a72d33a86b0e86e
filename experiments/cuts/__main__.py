"""Show what each cut of a model means for client and server, to choose one.

python -m experiments.cuts --model resnet18 --dataset cifar10 [run options]

Prints a line a cut and writes ``cuts.csv`` and ``cuts.png`` into ``--out``. A training step moves
the smashed data up and as many bytes of gradients down; the front's weights travel once a round.
"""

import math
import sys

from sfl.cli import run_program
from sfl.config import RunConfig
from sfl.nodes import NodeConfig
from sfl.options import parse_options


def main() -> None:
    prog = "python -m experiments.cuts"
    about = "Show what each cut of a model means for client and server."
    run, node = parse_options(None, RunConfig, NodeConfig, prog=prog, about=about)
    from experiments.cuts.cost_of_cuts import measure, show, write_csv
    from experiments.cuts.figure import draw
    from sfl.data.datasets import dataset_of
    from sfl.environment import set_up_torch
    from sfl.model.zoo import model_spec

    spec, device = dataset_of(run), set_up_torch(node)
    shape, default = spec.input_shape, model_spec(run.model).cut
    size = "x".join(map(str, shape))
    title = (
        f"{run.model} on {run.dataset} ({size}), {len(spec.classes)} classes,"
        f" batches of {run.batch_size}, {device.type}, {node.threads} thread(s)"
    )
    print(title)
    cuts = show(measure(run, shape, len(spec.classes), device), default)
    node.out_path.mkdir(parents=True, exist_ok=True)
    write_csv(node.out_path / "cuts.csv", cuts)
    draw(node.out_path / "cuts.png", title, cuts, math.prod(shape), default)
    print(f"drawn in {node.out_path / 'cuts.png'}")


if __name__ == "__main__":
    sys.exit(run_program("cuts", main))
