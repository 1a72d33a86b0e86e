"""Show what each cut of a model means for client and server, to choose one.

python -m experiments.cuts --model resnet18 --dataset cifar10 [run options]

Prints a line a cut and writes ``cuts.csv`` and ``cuts.png`` into ``--out``. A training step moves
the smashed data up and as many bytes of gradients down; the front's weights travel once a round.
"""

import csv
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.cli import run_program

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from sfl.config import RunConfig


@dataclass(frozen=True)
class Cut:
    """What a cut costs; FLOPs and bytes of one sample, milliseconds of one batch."""

    cut: int
    last_block: str  # of the client
    client_parameters: int
    server_parameters: int
    client_forward_flops: int
    server_forward_flops: int
    client_training_flops: int
    server_training_flops: int
    smashed_bytes: int
    client_forward_ms: float
    server_forward_ms: float
    server_backward_ms: float
    client_backward_ms: float


def measure(
    run: "RunConfig", input_shape: tuple[int, ...], num_classes: int, device: "torch.device"
) -> Iterator[Cut]:
    """Count and time every cut that has blocks on both sides.

    Raises:
        ConfigError: the model is a single block.
    """
    from experiments.support.costs import costs_of, times_of
    from sfl.errors import ConfigError
    from sfl.model.blocks import names_of
    from sfl.model.zoo import build, model_spec
    from sfl.strategy.recipe import Recipe
    from sfl.strategy.split_model import SplitModel

    model = build(model_spec(run.model), input_shape, num_classes, seed=run.seed)
    names = names_of(model)
    if len(names) < 2:
        raise ConfigError(f"--model {run.model} has one block, and no cut")
    for cut in range(1, len(names)):
        cut_there = dataclasses.replace(run, cut=cut, scheme="sflv1")  # any scheme with a cut
        split = SplitModel(Recipe.of(cut_there), input_shape, num_classes)
        front, back = costs_of(split, input_shape)
        times = times_of(split, input_shape, run.batch_size, device)
        yield Cut(
            cut,
            names[cut - 1],
            front.parameters,
            back.parameters,
            round(front.forward_flops),
            round(back.forward_flops),
            round(front.training_flops),
            round(back.training_flops),
            split.features_spec(1).num_bytes,
            *(1000 * seconds for seconds in times),
        )


def write_csv(path: Path, cuts: list[Cut]) -> None:
    """Write a line a cut."""
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, vars(cuts[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(cut) for cut in cuts)


def draw(path: Path, title: str, cuts: list[Cut], input_bytes: int, default: int | None) -> None:
    """Draw what lies on which side, what passes the cut, and how long a step takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        4, 1, sharex=True, figsize=(max(7, 1.5 + 0.45 * len(cuts)), 11), layout="constrained"
    )
    places = range(len(cuts))
    client, server, light = "tab:blue", "tab:orange", 0.45
    million = 1e6
    parameters, flops, smashed, seconds = panels
    _stack(parameters, places, [
        ([c.client_parameters / million for c in cuts], client, 1.0, "client"),
        ([c.server_parameters / million for c in cuts], server, 1.0, "server"),
    ])  # fmt: skip
    parameters.set_ylabel("parameters\n(millions)")
    _stack(flops, places, [
        ([c.client_training_flops / million for c in cuts], client, 1.0, "client"),
        ([c.server_training_flops / million for c in cuts], server, 1.0, "server"),
    ])  # fmt: skip
    flops.set_ylabel("training MFLOPs\na sample")
    smashed.bar(places, [c.smashed_bytes / 1024 for c in cuts], color="tab:green")
    smashed.axhline(input_bytes / 1024, color="black", linestyle="--", label="the sample itself")
    smashed.set_yscale("log", base=2)
    smashed.yaxis.set_major_formatter("{x:g}")
    smashed.set_ylabel("smashed data\n(KiB a sample)")
    _stack(seconds, places, [
        ([c.client_forward_ms for c in cuts], client, 1.0, "client, forward"),
        ([c.client_backward_ms for c in cuts], client, light, "client, backward"),
        ([c.server_forward_ms for c in cuts], server, 1.0, "server, forward"),
        ([c.server_backward_ms for c in cuts], server, light, "server, backward"),
    ])  # fmt: skip
    seconds.set_ylabel("a step of one\nbatch (ms)")
    seconds.set_xticks(places, [f"{c.cut}: {c.last_block}" for c in cuts], rotation=60, ha="right")
    seconds.set_xlabel("cut: blocks on the client, and the last of them")
    for axes in panels:
        for place in (p for p, c in enumerate(cuts) if c.cut == default):
            axes.axvspan(place - 0.5, place + 0.5, color="lightgrey", zorder=0, label="default cut")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[0].set_title(title, loc="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _stack(
    axes: "Axes", places: Sequence[int], rows: Sequence[tuple[list[float], str, float, str]]
) -> None:
    """Draw bars upon each other, a colour, an opacity and a label for each row of values."""
    bottom = [0.0] * len(places)
    for values, colour, alpha, label in rows:
        axes.bar(places, values, bottom=bottom, color=colour, alpha=alpha, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]


def show(cuts: Iterable[Cut], default: int | None) -> list[Cut]:
    """Print a line a cut as it is measured, and return them all."""
    print(
        f"{'cut behind':24} {'parameters':>23} {'training MFLOPs':>19} {'smashed':>9}"
        f" {'client ms':>13} {'server ms':>13}"
    )
    print(
        f"{'':24} {'client':>11} {'server':>11} {'client':>9} {'server':>9} {'bytes':>9}"
        + f" {'forw.':>6} {'backw.':>6}" * 2
    )
    shown = []
    for c in cuts:
        mark = " *" if c.cut == default else ""
        print(
            f"{f'{c.cut:2} {c.last_block}{mark}':24} {c.client_parameters:11,}"
            f" {c.server_parameters:11,} {c.client_training_flops / 1e6:9.2f}"
            f" {c.server_training_flops / 1e6:9.2f} {c.smashed_bytes:9,}"
            f" {c.client_forward_ms:6.1f} {c.client_backward_ms:6.1f}"
            f" {c.server_forward_ms:6.1f} {c.server_backward_ms:6.1f}",
            flush=True,
        )
        shown.append(c)
    if default is not None:
        print("* the model's own cut")
    return shown


def main() -> None:
    import math

    from sfl.config import RunConfig
    from sfl.data.datasets import dataset_of
    from sfl.environment import set_up_torch
    from sfl.model.zoo import model_spec
    from sfl.nodes import NodeConfig
    from sfl.options import parse_options

    prog = "python -m experiments.cuts"
    about = "Show what each cut of a model means for client and server."
    run, node = parse_options(None, RunConfig, NodeConfig, prog=prog, about=about)
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
