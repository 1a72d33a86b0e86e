"""The optimisers of ``--optimizer``."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from sfl.config import RunConfig
from sfl.registry import unknown_name

Parameters = Iterable[nn.Parameter]


def _adam(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    # Fused: needs parameters, gradients and moments in one memory layout; ``Segment`` sees to it.
    return torch.optim.Adam(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=True)


def _sgd(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[Parameters, RunConfig], torch.optim.Optimizer]] = {
    "adam": _adam,
    "sgd": _sgd,
}


def check_optimizer(name: str) -> None:
    """Raise ``ConfigError`` if there is no optimiser of this name."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
