"""Compare a run's rounds by a metric: the best one so far, and when the run stops early.

What is compared stands in ``rounds.csv``: a run that is resumed reads it there, and so stops after
the same round, with the same models kept, as one that was never interrupted.
"""

import math
from collections.abc import Mapping

from sfl.archive.layout import ANY_MODEL, model_path
from sfl.errors import counted
from sfl.strategy.recipe import Recipe


class BestRound:
    """The best of the rounds seen, by a metric; a round without it does not count."""

    def __init__(self, metric: str, *, falls: bool, min_delta: float = 0.0) -> None:
        """``falls``: lower is better; ``min_delta``: a round is better by more than this."""
        self.metric, self._min_delta = metric, min_delta
        self._sign = -1.0 if falls else 1.0
        self.round = -1  # none yet
        self.value = -self._sign * math.inf
        self.rounds_since = 0

    def see(self, round_index: int, figures: Mapping[str, float]) -> None:
        if self.metric not in figures:
            return
        value = figures[self.metric]
        if self._sign * (value - self.value) > self._min_delta:  # never true of NaN
            self.round, self.value, self.rounds_since = round_index, value, 0
        else:
            self.rounds_since += 1


class RoundsSeen:
    """What a run's rounds so far mean for those that follow."""

    def __init__(self, recipe: Recipe) -> None:
        self._rounds, self._stop = recipe.run.rounds, recipe.stop
        self._test_every = recipe.run.test_every
        falls, stop, best_by = recipe.task.compared, recipe.stop, recipe.keep.best_by
        self._watched = BestRound(
            stop.metric, falls=falls.get(stop.metric, False), min_delta=stop.min_delta
        )
        self.best = BestRound(best_by, falls=falls.get(best_by, False))  # whose models stay

    def see(self, round_index: int, figures: Mapping[str, float]) -> None:
        """Note a round's figures of training and validation, by the columns of ``rounds.csv``."""
        self._watched.see(round_index, figures)
        self.best.see(round_index, figures)

    def is_over(self, num_rounds: int) -> bool:
        """Return whether the run is over after so many rounds."""
        return num_rounds >= self._rounds or self._stops

    def is_tested(self, num_rounds: int) -> bool:
        """Return whether the model after so many rounds is evaluated on the test set."""
        every = self._test_every
        return self.is_over(num_rounds) or (every > 0 and num_rounds % every == 0)

    @property
    def _stops(self) -> bool:
        return bool(self._stop.metric) and self._watched.rounds_since >= self._stop.patience

    @property
    def told_best(self) -> str:
        """A line that names the round whose models stay; "" if none was the best."""
        best = self.best
        if best.round < 0:
            return ""
        return (
            f"best round: {best.round + 1}/{self._rounds}, {best.metric} {best.value:.4f}; its"
            f" models are {model_path(ANY_MODEL, best.round)}"
        )

    @property
    def why_stopped(self) -> str:
        """Why the run stops before its last round; "" if it does not."""
        if not self._stops:
            return ""
        best, patience = self._watched, counted(self._stop.patience, "round")
        than = f"than {best.value:.4f} in round {best.round + 1}" if best.round >= 0 else "at all"
        return f"{self._stop.metric} has not become better {than} for {patience}"
