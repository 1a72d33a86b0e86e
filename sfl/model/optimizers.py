"""The optimisers of ``--optimizer``."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sfl.config import RunConfig
from sfl.registry import named

Parameters = Iterable[nn.Parameter]


def _adam(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    # Fused: needs parameters, gradients and moments in one memory layout; ``Segment`` sees to it.
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
    """Return what makes a run's optimiser of some parameters.

    Raises:
        ConfigError: there is none of this name.
    """
    return functools.partial(named("optimizer", run.optimizer, OPTIMIZERS), run=run)
