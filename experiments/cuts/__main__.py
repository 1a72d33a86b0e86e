"""Show what the cuts of a model mean for client and server, to choose some.

python -m experiments.cuts --model resnet18 --dataset cifar10 [run options]
python -m experiments.cuts --model lenet5 --topology u-shaped    (every pair of cuts)
python -m experiments.cuts --model lenet5 --cut 3,6,9            (these)

Prints a line for each cut, or list of cuts, and writes ``cuts.csv`` and ``cuts.png`` into
``--out``. A training step moves the activations of each link one way, and as many bytes of
gradients the other; the weights of the clients' segments travel once a round.
"""

import math
import sys
from argparse import Namespace

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.options import Parser, parse_options
from sfl.program import run_program

PROG = "python -m experiments.cuts"


def parse() -> tuple[Namespace, list[str]]:
    """Return this program's options, and those of the run."""
    parser = Parser(
        prog=PROG,
        description="Show what the cuts of a model mean for client and server: the list that --cut"
        " gives, or all that fit --topology.",
        epilog="All other options are those of a run: see python -m experiments.simulate --help.",
    )
    parser.add_argument(
        "--num-cuts", type=int, help="how many cuts (default: the fewest that --topology takes)"
    )
    return parser.parse_known_args()


def main() -> None:
    own, rest = parse()
    if own.num_cuts is not None and own.num_cuts < 1:
        raise ConfigError(f"--num-cuts {own.num_cuts}: must be at least 1")
    run, node = parse_options(rest, RunConfig, NodeConfig, prog=PROG, about="")
    from experiments.cuts.cost_of_cuts import lists_of_cuts, measure, show, write_csv
    from experiments.cuts.figure import draw
    from sfl.data.datasets import dataset_of
    from sfl.environment import set_up_torch
    from sfl.model.zoo import build, model_spec

    spec, device, model = dataset_of(run), set_up_torch(node), model_spec(run.model)
    num_blocks = len(build(model, spec.input_shape, len(spec.classes), seed=run.seed))
    size = "x".join(map(str, spec.input_shape))
    title = (
        f"{run.model} on {run.dataset} ({size}), {len(spec.classes)} classes,"
        f" batches of {run.batch_size}, {device.type}, {node.threads} thread(s)"
    )
    lists = lists_of_cuts(run, own.num_cuts, num_blocks)
    print(title)
    found = show(measure(run, lists, spec, device), model.cut)
    node.out_path.mkdir(parents=True, exist_ok=True)
    write_csv(node.out_path / "cuts.csv", found)
    draw(node.out_path / "cuts.png", title, found, math.prod(spec.input_shape), model.cut)
    print(f"drawn in {node.out_path / 'cuts.png'}")


if __name__ == "__main__":
    sys.exit(run_program("cuts", main))
