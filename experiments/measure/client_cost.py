"""What training costs a client with many clients: the field's cost table, counted and measured.

python -m experiments.measure.client_cost [--clients 100,500] [--passes 100] [--batch-size 32]

FLOPs are counted (a multiplication and an addition are two), bytes are the sizes of the files that
would travel. Published: Vepakomma et al. 2018 (arXiv 1812.00564), Tables 1 and 2, VGG on CIFAR-10
and ResNet-50 on CIFAR-100. They do not say how long was trained, so the table gives what one pass
over the data (a step of large-batch SGD, a round of federated learning) costs, and how many of them
the published figure stands for: if the assumptions below are theirs, both columns of clients give
the same number.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from sfl.errors import ConfigError
from sfl.options import Parser
from sfl.program import run_program

NUM_SAMPLES = 50_000  # training images of CIFAR-10 and CIFAR-100
METHODS = {"sync-sgd": "large-batch SGD", "fl": "federated learning", "sl": "split learning"}
TERA, GIGA = 1e12, 1e9

# By method, for 100 and 500 clients.
PUBLISHED_TFLOPS = {"sync-sgd": (29.4, 5.89), "fl": (29.4, 5.89), "sl": (0.1548, 0.03)}
PUBLISHED_GB = {"sync-sgd": (13.0, 14.0), "fl": (3.0, 2.4), "sl": (6.0, 1.2)}
PUBLISHED_CLIENTS = (100, 500)

ASSUMPTIONS = """\
Assumed:
- {samples:,} training images, dealt out equally; every client takes part in everything.
- The client's FLOPs are those of its part of the model, forward and backward; the gradient with
  respect to the images is not computed. Large-batch SGD and federated learning train it whole.
- Large-batch SGD makes one step over everybody's data in a pass: gradients up, weights down.
- Federated learning makes one pass a round: weights up, weights down.
- Split learning sends activations and labels up and gradients down in batches of {batch}, and
  receives the front from the client before and hands it on once a pass.
- {vgg} is torchvision's, cut behind block {vgg_cut} ({vgg_block}); {resnet} behind block
  {resnet_cut} ({resnet_block}). Images are 32x32; another cut changes split learning alone.
- Bytes are those of torch.save files, without the frames around them; validation is left out.
"""


def table(
    title: str,
    unit: float,
    costs: dict[tuple[str, int], float],
    published: dict[str, tuple[float, float]],
    clients: Sequence[int],
) -> str:
    """Return a Markdown table of one pass's costs beside the published totals."""
    header = ["method"]
    for count in clients:
        header += [f"{count} clients: a pass", "published", "passes that is"]
    rows = [header, ["---"] * len(header)]
    for method, name in METHODS.items():
        row = [name]
        for count in clients:
            cost = costs[method, count] / unit
            theirs = dict(zip(PUBLISHED_CLIENTS, published[method], strict=True)).get(count)
            row += [f"{cost:.4g}"]
            row += ["-", "-"] if theirs is None else [f"{theirs:g}", f"{theirs / cost:.1f}"]
        rows.append(row)
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse() -> Namespace:
    parser = Parser(
        prog="python -m experiments.measure.client_cost", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--clients", default="100,500", help="numbers of them (default: 100,500)")
    parser.add_argument("--passes", type=int, default=100, help="of the totals (default: 100)")
    parser.add_argument("--batch-size", type=int, default=32, help="of split learning")
    parser.add_argument("--vgg-cut", type=int, help="blocks of VGG on the client")
    parser.add_argument("--resnet-cut", type=int, help="blocks of ResNet-50 on the client")
    return parser.parse_args()


def counts(text: str) -> list[int]:
    """Return the numbers of clients in a list with commas.

    Raises:
        ConfigError: one of them cannot be.
    """
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        found = [0]
    if not all(1 <= count <= NUM_SAMPLES for count in found):
        raise ConfigError(f"--clients {text}: give numbers from 1 to {NUM_SAMPLES}")
    return found


def print_totals(
    passes: int,
    flops: dict[tuple[str, int], float],
    num_bytes: dict[tuple[str, int], float],
    clients: Sequence[int],
) -> None:
    """Print what so many passes cost a client."""
    print(f"\nTotals of {passes} passes\n")
    header = ["method", *(f"{what}, {k}" for what in ("TFLOPs", "GB") for k in clients)]
    print(f"| {' | '.join(header)} |")
    print("|" + " --- |" * len(header))
    for method, name in METHODS.items():
        cells = [f"{passes * flops[method, k] / TERA:.4g}" for k in clients]
        cells += [f"{passes * num_bytes[method, k] / GIGA:.4g}" for k in clients]
        print(f"| {' | '.join([name, *cells])} |")


def main() -> None:
    options = parse()
    clients = counts(options.clients)
    if options.passes < 1 or options.batch_size < 1:
        raise ConfigError("--passes and --batch-size: must be at least 1")
    from experiments.measure.pass_cost import cost_of_a_pass, cut_of

    chosen = {"vgg16": (options.vgg_cut, 10), "resnet50": (options.resnet_cut, 100)}
    costs = {
        model: {
            (method, count): cost_of_a_pass(
                model, cut, classes, method, NUM_SAMPLES // count, options.batch_size
            )
            for method in METHODS
            for count in clients
        }
        for model, (cut, classes) in chosen.items()
    }
    flops = {key: cost.flops for key, cost in costs["vgg16"].items()}
    num_bytes = {key: cost.num_bytes for key, cost in costs["resnet50"].items()}
    of_flops = "TFLOPs a client, VGG-16 on CIFAR-10"
    of_bytes = "GB a client, ResNet-50 on CIFAR-100"
    print(table(of_flops, TERA, flops, PUBLISHED_TFLOPS, clients))
    print()
    print(table(of_bytes, GIGA, num_bytes, PUBLISHED_GB, clients))
    print_totals(options.passes, flops, num_bytes, clients)
    named = {}
    for short, model in (("vgg", "vgg16"), ("resnet", "resnet50")):
        cut, block = cut_of(model, *chosen[model])
        named |= {short: model, f"{short}_cut": cut, f"{short}_block": block}
    print("\n" + ASSUMPTIONS.format(samples=NUM_SAMPLES, batch=options.batch_size, **named), end="")


if __name__ == "__main__":
    sys.exit(run_program("client_cost", main))
