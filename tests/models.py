"""Models for tests, named on command lines as ``tests.models:<function>``."""

import time

import torch
from torch import nn

from experiments.small_model import bn_dropout

__all__ = ["bn_dropout", "refusing_large", "slow", "with_huge_layer"]


def with_huge_layer(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model behind whose cut a large input makes BatchNorm's variance overflow."""
    huge = nn.Linear(32, 32)
    with torch.no_grad():
        huge.weight.mul_(1e4)
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), huge, norm, nn.Linear(32, num_classes))


class _RefusesLarge(nn.Module):
    """Passes on what it is given, but for large numbers."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.training and float(z.detach().abs().max()) > self.limit:
            raise ValueError("too large")
        return z


def refusing_large(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model whose blocks before and behind BatchNorm raise on large numbers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), _RefusesLarge(1e3), nn.BatchNorm1d(32, affine=False),
        _RefusesLarge(10), nn.Linear(32, num_classes),
    )  # fmt: skip


class _Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.8)
        return x.flatten(1)


def slow(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model that takes its time for each batch."""
    return nn.Sequential(_Slow(), nn.Linear(784, num_classes))
