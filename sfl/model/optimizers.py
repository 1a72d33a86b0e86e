"""The optimisers of ``--optimizer``."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sfl.config import RunConfig
from sfl.registry import named

Parameters = Iterable[nn.Parameter]


def _adam(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    # Fused: parameters, gradients and moments need one memory layout, see SegmentOptimizer.
    return torch.optim.Adam(parameters, lr=run.lr, weight_decay=run.weight_decay, fused=True)


def _sgd(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": _adam,
    "sgd": _sgd,
}


def optimizer_of(run: RunConfig) -> Callable[[Parameters], torch.optim.Optimizer]:
    """Return a function that makes a run's optimiser for some parameters.

    Raises:
        ConfigError: no optimiser has this name.
    """
    return functools.partial(named("optimizer", run.optimizer, OPTIMIZERS), run=run)
