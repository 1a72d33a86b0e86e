"""Learning-rate schedules: the factor on ``--lr`` in each round."""

import math
from collections.abc import Callable

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.registry import with_options


def constant(round_index: int, rounds: int) -> float:
    """Keep the learning rate constant."""
    return 1.0


def cosine(round_index: int, rounds: int, *, floor: float = 0.0) -> float:
    """Decrease along half a cosine, from 1 in round 0 to ``floor`` after ``rounds``; then constant.

    Loshchilov & Hutter 2017 (arXiv 1608.03983), Equation 5, without restarts.
    """
    if not 0 <= floor <= 1:
        raise ValueError("wanted: floor in [0, 1]")
    done = min(round_index / rounds, 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def step(round_index: int, rounds: int, *, every: int = 10, factor: float = 0.1) -> float:
    """Multiply by ``factor`` every ``every`` rounds."""
    if not (every >= 1 and factor > 0):
        raise ValueError("wanted: every at least 1, factor above 0")
    return float(factor ** (round_index // every))


# A schedule's options follow a colon: --lr-schedule step:every=5,factor=0.5
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "cosine": cosine,
    "step": step,
}


def learning_rates(run: RunConfig) -> Callable[[int], float]:
    """Return a function from round to learning rate.

    Raises:
        ConfigError: the schedule is unknown, does not accept its options, or gives a rate that is
            too large.
    """
    schedule = with_options("lr-schedule", run.lr_schedule, SCHEDULES)

    def learning_rate(round_index: int) -> float:
        return run.lr * schedule(round_index, run.lr_rounds or run.rounds)

    last = learning_rate(run.rounds - 1)
    if not (math.isfinite(last) and last < 1e30):
        raise ConfigError(f"--lr-schedule {run.lr_schedule}: ends at a learning rate of {last:g}")
    return learning_rate
