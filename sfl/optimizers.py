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
Row = tuple[nn.Parameter, Tensor, Tensor]  # a parameter and its moments
# What a step works on: the rows of a group, and for each of them how many steps were taken.
Rows = list[tuple[dict[str, Any], list[Tensor], list[Row]]]


class Adam(torch.optim.Adam):
    """torch's Adam; on the CPU its step runs the same operations, and little else.

    Kingma and Ba 2015, Algorithm 1, with the bits of ``torch.optim.Adam``: each operation is one
    of ``torch.optim.adam._single_tensor_adam``, in its order.
    """

    _rows: Rows | None  # None: not yet, or torch is to look each time

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
        if self._rows is None or not self._all_have_gradients():
            super().step()
            self._rows = self._gather()
            return
        for group, counts, rows in self._rows:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            torch._foreach_add_(counts, 1)
            num_steps = counts[0].item()
            step_size, divisor = lr / (1 - beta1**num_steps), (1 - beta2**num_steps) ** 0.5
            for parameter, mean, square in rows:
                grad, weights = parameter.grad, parameter.detach()
                assert grad is not None
                if decay:
                    grad = grad.add(weights, alpha=decay)
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = square.sqrt().div_(divisor).add_(group["eps"])
                weights.addcdiv_(mean, root, value=-step_size)

    def _all_have_gradients(self) -> bool:
        return all(p.grad is not None for group in self.param_groups for p in group["params"])

    def _gather(self) -> Rows | None:
        """Return what a step works on; None where parameters have taken different steps."""
        found: Rows = []
        for group in self.param_groups:
            parameters = group["params"]
            if not all(p.device.type == "cpu" and p in self.state for p in parameters):
                return None  # one without a state has had no gradient yet
            states = [self.state[p] for p in parameters]
            counts = [state["step"] for state in states]
            if len(set(map(float, counts))) > 1:
                return None
            moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
            found.append(
                (group, counts, [(p, *two) for p, two in zip(parameters, moments, strict=True)])
            )
        return found


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
