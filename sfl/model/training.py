"""How segments are trained: what a run's options say of it, with their names looked up."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfl.config import RunConfig
from sfl.model.optimizers import Parameters, optimizer_of
from sfl.model.schedule import learning_rates


@dataclass(frozen=True)
class Training:
    """How the segments of a run are trained."""

    seed: int
    make_optimizer: Callable[[Parameters], torch.optim.Optimizer]
    learning_rate: Callable[[int], float]  # of each round
    keeps_optimizer: bool  # else each round begins with a fresh one
    clip_norm: float  # of each side of the cut; 0: gradients are not clipped
    cut: int  # blocks in front of it
    proximal_mu: float = 0.0  # FedProx's, of a client's segment
    class_weights: tuple[float, ...] = ()  # in the loss; none: samples weigh alike

    @classmethod
    def of(cls, run: RunConfig, cut: int) -> "Training":
        """Return how a run trains.

        Raises:
            ConfigError: there is no such optimiser or schedule.
        """
        return cls(
            seed=run.seed,
            make_optimizer=optimizer_of(run),
            learning_rate=learning_rates(run),
            keeps_optimizer=run.optimizer_state == "keep",
            clip_norm=run.clip_norm,
            cut=cut,
        )
