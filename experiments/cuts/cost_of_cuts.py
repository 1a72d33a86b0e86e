"""What each cut of a model costs client and server: counted, timed, and shown as a table."""

import csv
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.support.costs import costs_of, times_of
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.blocks import names_of
from sfl.model.zoo import build, model_spec
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel


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
    run: RunConfig, input_shape: tuple[int, ...], num_classes: int, device: torch.device
) -> Iterator[Cut]:
    """Count and time every cut that has blocks on both sides.

    Raises:
        ConfigError: the model is a single block.
    """
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
