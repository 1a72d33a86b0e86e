"""Models for tests, named on command lines as ``tests.support.models:<function>``."""

import os
import time
from collections import OrderedDict

import torch
from torch import Tensor, nn

from experiments.chaos.small_model import bn_dropout

__all__ = ["bn_dropout", "branching", "channels_last", "convolutions", "cubing_large",
           "in_bfloat16", "in_float16", "in_float64", "masked", "of_this_machine", "refusing_large",
           "slow", "with_huge_layer"]  # fmt: skip
VARIANT = "SFL_TEST_VARIANT"  # how this machine's code differs from the others'


class Scaled(nn.Module):
    """A module whose hyperparameter stands nowhere but in an attribute."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale
        self.made_at = time.perf_counter_ns()  # another one each time: no part of the structure
        self.anything = object()
        self.table = {"b": {3, 1, 2}, "a": lambda x: x}
        self.folder = f"/home/{os.getpid()}"  # of this machine

    def forward(self, x: Tensor) -> Tensor:
        return x * self._scale


def of_this_machine(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build a small perceptron, with what differs on this machine."""
    variant = os.environ.get(VARIANT, "")
    slope = 0.2 if variant == "slope" else 0.1
    model = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(int(torch.Size(input_shape).numel()), 16),
            act=nn.Tanh() if variant == "class" else nn.LeakyReLU(slope),
            scaled=Scaled(0.7 if variant == "scale" else 0.5),
            norm=nn.BatchNorm1d(16),
            fc2=nn.Linear(16, num_classes),
        )
    )
    if variant == "mode":
        model.norm.eval()
    if variant == "frozen":
        model.fc2.weight.requires_grad_(False)
    if variant == "block":
        model.add_module("more", nn.Identity())
    if variant == "weights":  # as another processor draws them
        with torch.no_grad():
            model.fc1.weight[0, 0] += 1e-3
    return model


def with_huge_layer(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model behind whose cut a large input makes BatchNorm's variance overflow."""
    huge = nn.Linear(32, 32)
    with torch.no_grad():
        huge.weight.mul_(1e4)
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), huge, norm, nn.Linear(32, num_classes))


class _CubesLarge(nn.Module):
    """Passes on what it is given, but makes large numbers far larger."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + torch.relu(z.abs() - 1e3) ** 3


def cubing_large(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model behind whose cut large activations, though finite, give no finite loss."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), _CubesLarge(), nn.Linear(32, num_classes)
    )


class _Branches(nn.Module):
    """Computes by what it is given: a graph that is the same for all inputs cannot hold that."""

    def forward(self, z: Tensor) -> Tensor:
        return z if bool(z.sum() > 0) else -z


def branching(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model whose back can be trained, but not exported as a graph."""
    first, last = nn.Linear(784, 32), nn.Linear(32, num_classes)
    return nn.Sequential(nn.Flatten(), first, _Branches(), last)


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


class _Masked(nn.Module):
    """Keeps a mask of minus infinity, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.mask.exp().sum() - 1


def masked(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a model with a mask that is not finite."""
    return nn.Sequential(nn.Flatten(), _Masked(), nn.Linear(784, num_classes))


def convolutions(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return two convolutions and a linear layer, for images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(200, num_classes),
    )  # fmt: skip


def channels_last(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return ``convolutions`` with the channels side by side in memory."""
    return convolutions(input_shape, num_classes).to(memory_format=torch.channels_last)


class To(nn.Module):
    """Goes on in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _in(dtype: torch.dtype) -> nn.Sequential:
    inner = nn.Linear(32, 32, dtype=dtype)
    first, last = nn.Linear(784, 32), nn.Linear(32, 10)
    return nn.Sequential(nn.Flatten(), first, To(dtype), inner, nn.ReLU(), To(torch.float32), last)


def in_float64(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return _in(torch.float64)


def in_float16(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return _in(torch.float16)


def in_bfloat16(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return _in(torch.bfloat16)
