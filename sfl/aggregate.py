"""Averaging of models: pure functions on state dicts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def fed_avg(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted average of state dicts with the same names, shapes and dtypes.

    FedAvg, McMahan et al. 2017, Algorithm 1: ``w = sum_k (n_k / n) w_k``, with ``weights`` n_k:
    numbers of samples, or ones for an equal average. Buffers (BatchNorm's running statistics) are
    averaged like parameters; integer ones are rounded and stay integer. The sum is taken in the
    order of ``states``, in float64, and divided once. So the average of identical float32 models is
    that model, exactly, for whole-numbered weights up to 2^29: n_k * w fits into float64's 53 bits.
    """
    if not states or len(states) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError("give one state and one weight a client, not all of weight 0")
    total = sum(weights)
    average = {}
    for name, first in states[0].items():
        summed = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            summed += state[name].detach().cpu().double() * weight
        mean = summed / total
        average[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return average
