"""How segments are trained: a run's options, with names resolved."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfl.config import RunConfig
from sfl.model.optimizers import Parameters, optimizer_of
from sfl.model.schedule import learning_rates
from sfl.model.task import TASKS, Task
from sfl.registry import named


@dataclass(frozen=True)
class Training:
    """How the segments of a run are trained."""

    task: Task
    seed: int
    make_optimizer: Callable[[Parameters], torch.optim.Optimizer]
    learning_rate: Callable[[int], float]  # of each round
    keeps_optimizer: bool  # if not, each round starts with a fresh one
    clip_norm: float  # of each segment; 0: gradients are not clipped
    cuts: tuple[int, ...]  # number of blocks in front of each
    proximal_mu: float = 0.0  # of FedProx, for a client's segment
    class_weights: tuple[float, ...] = ()  # in the loss; empty: not weighted
    loss_weight: float = 1.0  # of the loss among those of several tasks

    @classmethod
    def of(cls, run: RunConfig, cuts: tuple[int, ...]) -> "Training":
        """Return the training of a run by its options.

        Raises:
            ConfigError: a task, optimiser or schedule is unknown.
        """
        return cls(
            task=named("task", run.task, TASKS),
            seed=run.seed,
            make_optimizer=optimizer_of(run),
            learning_rate=learning_rates(run),
            keeps_optimizer=run.optimizer_state == "keep",
            clip_norm=run.clip_norm,
            cuts=cuts,
        )
