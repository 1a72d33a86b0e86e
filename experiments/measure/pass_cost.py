"""What one pass over its data costs a client: FLOPs, and bytes that would travel."""

from dataclasses import dataclass
from functools import cache

import torch

from experiments.support.costs import client_flops
from sfl.config import RunConfig
from sfl.data.client_data import batch_sizes
from sfl.files.torch_file import encode, encode_state
from sfl.model.blocks import names_of
from sfl.model.zoo import build, model_spec
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class PassCost:
    """What one pass over its data costs a client."""

    flops: float
    num_bytes: float


@cache
def _cut_model(
    model: str, cut: int | None, num_classes: int, method: str
) -> tuple[SplitModel, float, int]:
    """Return a model, a client's FLOPs of one sample in it, and the bytes of its weights' file."""
    split = SplitModel(
        Recipe.of(RunConfig(scheme=method, model=model, cut=cut)), SHAPE, num_classes
    )
    return split, client_flops(split), len(encode_state(split.front_state()))


def cost_of_a_pass(
    model: str, cut: int | None, num_classes: int, method: str, samples: int, batch_size: int
) -> PassCost:
    """Count and measure what one pass costs a client that has so many samples."""
    split, flops_of_one, file_bytes = _cut_model(model, cut, num_classes, method)
    flops, num_bytes = samples * flops_of_one, 2 * file_bytes
    if split.cuts:
        for size in batch_sizes(samples, batch_size):
            spec = split.features_spec(size)
            features = len(encode(torch.zeros(spec.shape)))
            num_bytes += 2 * features + len(encode(torch.zeros(size, dtype=torch.int64)))
    return PassCost(flops, num_bytes)


def cut_of(model: str, cut: int | None, num_classes: int) -> tuple[int | None, str]:
    """Return a model's cut, its own if none is chosen, and the name of the block before it."""
    spec = model_spec(model)
    cut = spec.cut if cut is None else cut
    return cut, names_of(build(spec, SHAPE, num_classes, seed=0))[(cut or 1) - 1]
