"""Waiting by looking again and again for a short while, and only then asleep.

A core that has slept takes its time to wake up, which for a small model is a good part of a step.
So who has lately waited no longer than ``SPIN_S`` does not go to sleep for as long; between two
looks it leaves its core to whoever else wants it. What there is to do meanwhile, in small pieces,
comes first.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SPIN_S = 10e-3
_CAN_YIELD = hasattr(os, "sched_yield")  # Windows cannot


class Spinner:
    """Waits for one thing after the other; for one thread at a time."""

    def __init__(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """``meanwhile`` does a piece of something else, and says whether there was any."""
        self.meanwhile = meanwhile
        self._was_short = False

    def wait(self, look: Callable[[], T | None], sleep: Callable[[], T]) -> T:
        """Return what ``look`` finds, or, if that is None for too long, what ``sleep`` does."""
        started = time.perf_counter()
        found = None
        while found is None and self.meanwhile():
            found = look()
        if found is None and self._was_short and _CAN_YIELD:
            deadline = started + SPIN_S
            while (found := look()) is None and time.perf_counter() < deadline:
                os.sched_yield()
        if found is None:
            found = sleep()
        self._was_short = time.perf_counter() - started < SPIN_S
        return found
