"""What the segments of a cut model cost: parameters, FLOPs, bytes at the cuts, seconds."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from sfl.config import RunConfig
from sfl.model.topology import Holder, Segments, route
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.split_model import SplitModel
from sfl.values import Position

AT = Position("", 0, 0, 0)
COUNTED = 2  # samples that FLOPs are counted on: BatchNorm takes no less
REPEATS = 5  # steps that are timed; the fastest of each part counts


@dataclass(frozen=True)
class SegmentCost:
    """What one segment of the model costs; FLOPs are of one sample."""

    parameters: int
    forward_flops: float
    training_flops: float  # forward and backward


def segments_of(split: SplitModel, device: torch.device) -> Segments:
    """Return all segments of a model, from input to output, whoever holds them."""
    held = {}
    for holder in set(split.recipe.segments.values()):
        held |= split.segments(holder, device)
    return Segments({name: held[name] for name in split.recipe.segments})


def givers(segments: Mapping[str, Holder]) -> dict[int, Holder]:
    """Return the links between parties, and who sends activations over each."""
    ways = {holder: route(segments, holder) for holder in set(segments.values())}
    found = {stop.gives: holder for holder, way in ways.items() for stop in way}
    return {link: found[link] for link in sorted(found.keys() - {None})}


def costs_of(split: SplitModel, *holders: Holder) -> dict[str, SegmentCost]:
    """Count what each segment of these parties costs, by ``torch.utils.flop_counter``.

    It counts matrix products and convolutions, a multiplication and an addition as two FLOPs. The
    gradient with respect to the data is never computed, and so not counted.
    """
    links = [split.features_spec(COUNTED, link) for link in range(len(split.cuts))]
    inputs = [torch.zeros(COUNTED, *split.input_shape)]
    inputs += [torch.zeros(spec.shape, dtype=spec.dtype) for spec in links]
    names, costs = list(split.recipe.segments), {}
    held = {name for holder in holders for name in split.held_by(holder)}
    segments = segments_of(split, torch.device("cpu"))
    for name, x in zip(names, inputs, strict=True):
        if name not in held:
            continue
        segment = segments[name]
        with FlopCounterMode(display=False) as forward:
            z = segment.forward(x, AT)
        with FlopCounterMode(display=False) as backward:
            segment.backward(torch.zeros_like(z))
        counts = [counter.get_total_flops() / COUNTED for counter in (forward, backward)]
        parameters = sum(parameter.numel() for parameter in segment.blocks.parameters())
        costs[name] = SegmentCost(parameters, counts[0], sum(counts))
    return costs


def client_flops(split: SplitModel) -> float:
    """Count what training costs a client, for one sample; without clients, the whole model's."""
    holders = Holder if split.recipe.scheme.pooled else [Holder.CLIENT]
    return sum(cost.training_flops for cost in costs_of(split, *holders).values())


def times_of(
    split: SplitModel, batch_size: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Return the seconds of each segment in a step, forward and backward.

    Of random samples, the fastest of several steps after one that is not timed.
    """
    segments = segments_of(split, device)
    x, timed = torch.rand(batch_size, *split.input_shape), []
    for _ in range(1 + REPEATS):
        z, marks = x, [_now(device)]
        for segment in segments.values():
            z = segment.forward(z, AT)
            marks.append(_now(device))
        grad = torch.ones_like(z)
        for segment in reversed(segments.values()):
            grad = segment.backward(grad)
            marks.append(_now(device))
        timed.append([after - before for before, after in itertools.pairwise(marks)])
    fastest = [min(part) for part in zip(*timed[1:], strict=True)]
    forward, backward = fastest[: len(segments)], fastest[len(segments) :]
    parts = zip(forward, reversed(backward), strict=True)
    return dict(zip(segments, parts, strict=True))


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
    whose fronts stay, has ``2(p/K)q``, and synchronous SGD ``2|W|`` a step. With several cuts ``q``
    is summed over them, and ``beta`` is the share of all segments of the client.
    """
    row = split.recipe.scheme
    if row.pooled or not samples:
        return 0, 0
    named = split.entries.trained | split.entries.frozen
    weights = 2 * sum(spec.num_bytes for n, spec in split.front_spec.items() if n in named)
    if row.exchange is Exchange.WEIGHT_GRADS:
        return 0, weights * num_steps
    crossing = sum(split.features_spec(1, link).num_bytes for link in givers(split.recipe.segments))
    smashed = 2 * samples * run.local_epochs * crossing
    return smashed, 0 if row.fronts is Fronts.OWN else weights
