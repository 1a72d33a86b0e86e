"""What the two halves of a cut model cost: parameters, FLOPs, bytes at the cut, seconds."""

import itertools
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from sfl.config import RunConfig
from sfl.model.segment import Segment
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.split_model import SplitModel
from sfl.values import Position

AT = Position("", 0, 0, 0)
COUNTED = 2  # samples that FLOPs are counted on: BatchNorm takes no less
REPEATS = 5  # steps that are timed; the fastest of each part counts


@dataclass(frozen=True)
class HalfCost:
    """What one half of the model costs; FLOPs are of one sample."""

    parameters: int
    forward_flops: float
    training_flops: float  # forward and backward


def costs_of(split: SplitModel, input_shape: tuple[int, ...]) -> list[HalfCost]:
    """Count what each of a model's segments costs, by ``torch.utils.flop_counter``.

    It counts matrix products and convolutions, a multiplication and an addition as two FLOPs. The
    gradient with respect to the data is never computed, and so not counted.
    """
    z, costs = torch.zeros(COUNTED, *input_shape), []
    for segment in _segments(split, torch.device("cpu")):
        with FlopCounterMode(display=False) as forward:
            z = segment.forward(z, AT)
        with FlopCounterMode(display=False) as backward:
            segment.backward(torch.zeros_like(z))
        counts = [counter.get_total_flops() / COUNTED for counter in (forward, backward)]
        parameters = sum(parameter.numel() for parameter in segment.blocks.parameters())
        costs.append(HalfCost(parameters, counts[0], sum(counts)))
    return costs


def times_of(
    split: SplitModel, input_shape: tuple[int, ...], batch_size: int, device: torch.device
) -> list[float]:
    """Return the seconds of the parts of a step: front and back forward, back and front backward.

    Of random samples, the fastest of several steps after one that is not timed.
    """
    front, back = _segments(split, device)
    x = torch.rand(batch_size, *input_shape)
    timed = []
    for _ in range(1 + REPEATS):
        marks = [_now(device)]
        z = front.forward(x, AT)
        marks.append(_now(device))
        out = back.forward(z, AT)
        marks.append(_now(device))
        grad = back.backward(torch.ones_like(out))
        marks.append(_now(device))
        assert grad is not None
        front.backward(grad)
        marks.append(_now(device))
        timed.append([after - before for before, after in itertools.pairwise(marks)])
    return [min(part) for part in zip(*timed[1:], strict=True)]


def _segments(split: SplitModel, device: torch.device) -> list[Segment]:
    front = split.front(device)
    return [front, split.back(device)] if split.cuts else [front]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def formula_bytes(
    run: RunConfig, split: SplitModel, samples: int, num_steps: int
) -> tuple[int, int]:
    """Return what a client's training sends and receives in a round, by the field's formulas:
    smashed data with their gradients, and weights.

    Thapa et al. 2022 (arXiv 2004.12088), Table 2: with ``|W|`` the bytes of all parameters, ``q``
    those of a sample's smashed data, ``beta`` the front's share of ``|W|`` and ``p/K`` the client's
    samples, ``2|W|`` in FL, ``2(p/K)q + 2 beta |W|`` in SL and both SFL. By the same count SFLV3,
    whose fronts stay, has ``2(p/K)q``, and synchronous SGD ``2|W|`` a step.
    """
    row = split.recipe.scheme
    if row.pooled or not samples:
        return 0, 0
    named = split.entries.trained | split.entries.frozen
    weights = 2 * sum(spec.num_bytes for n, spec in split.front_spec.items() if n in named)
    if row.exchange is Exchange.WEIGHT_GRADS:
        return 0, weights * num_steps
    smashed = 2 * samples * run.local_epochs * split.features_spec(1).num_bytes if split.cuts else 0
    return smashed, 0 if row.fronts is Fronts.OWN else weights
