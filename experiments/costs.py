"""What the two halves of a cut model cost: parameters, FLOPs, bytes at the cut, seconds."""

import itertools
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from sfl.protocol import Position
from sfl.segment import Segment
from sfl.split_model import SplitModel

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
