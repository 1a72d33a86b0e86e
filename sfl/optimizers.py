"""The optimisers of ``--optimizer``, and their steps without what a small model need not pay.

Behind a wait no Python is in a cache: what torch does around an update, for cases that do not occur
here, takes a good part of a small model's update.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sfl.config import RunConfig, unknown_name

Parameters = Iterable[nn.Parameter]
Row = tuple[nn.Parameter, Tensor, Tensor, Tensor]  # with how many steps were taken, and the moments


class Adam(torch.optim.Adam):
    """torch's Adam; on the CPU its step runs the same operations, and little else.

    Kingma and Ba 2015, Algorithm 1, with the bits of ``torch.optim.Adam``: each operation is one
    of ``torch.optim.adam._single_tensor_adam``, in its order.
    """

    _rows: list[tuple[dict[str, Any], list[Row]]] | None  # by group; None: not yet, or never

    def __init__(self, parameters: Parameters, *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._rows = None

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, and of a loaded state
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._rows = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters have; there is no ``closure``."""
        if self._rows is None:
            super().step()
            self._rows = self._gather()
            return
        for group, rows in self._rows:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for parameter, count, mean, square in rows:
                if (grad := parameter.grad) is None:
                    continue
                weights = parameter.detach()
                steps = count.add_(1).item()
                if decay:
                    grad = grad.add(weights, alpha=decay)
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = square.sqrt().div_((1 - beta2**steps) ** 0.5).add_(group["eps"])
                weights.addcdiv_(mean, root, value=-(lr / (1 - beta1**steps)))

    def _gather(self) -> list[tuple[dict[str, Any], list[Row]]] | None:
        """Return by group what a step works on; None where torch is to look each time."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not all(p.device.type == "cpu" and p in self.state for p in parameters):
            return None  # one without a state has had no gradient yet
        return [(group, list(map(self._row, group["params"]))) for group in self.param_groups]

    def _row(self, parameter: nn.Parameter) -> Row:
        state = self.state[parameter]
        return parameter, state["step"], state["exp_avg"], state["exp_avg_sq"]


def _adam(parameters: Parameters, run: RunConfig) -> torch.optim.Optimizer:
    return Adam(parameters, lr=run.lr, weight_decay=run.weight_decay)


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


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Do what ``optimizer.step()`` does, without the hooks that torch has put around it.

    They serve its profiler.
    """
    step = type(optimizer).step
    bare = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    bare(optimizer)
