"""Waiting by looking again and again for a short while, and only then asleep.

A core that has slept takes its time to wake up, which for a small model is a good part of a step.
So who has lately waited no longer than ``SPIN_S`` does not go to sleep for as long, unless another
thread or process wants the core: then it sleeps at once, and if that happens time after time, for
its next waits, too. What there is to do meanwhile, in small pieces, comes first.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
# Windows and macOS do not say whether another thread has had this one's core.
_OURS: int | None = getattr(resource, "RUSAGE_THREAD", None)

T = TypeVar("T")
SPIN_S = 2e-3
_MAX_REST = 64


class Spinner:
    """Waits for one thing after the other; for one thread at a time."""

    def __init__(self, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """``meanwhile`` does a piece of something else, and says whether there was any."""
        self.meanwhile = meanwhile
        self._was_short = False
        self._rest = 0  # waits to sleep through once another has wanted the core, time after time
        self._resting = 0

    def wait(self, look: Callable[[], T | None], sleep: Callable[[], T]) -> T:
        """Return what ``look`` finds, or, if that is None for too long, what ``sleep`` does."""
        started = time.perf_counter()
        found = None
        while found is None and self.meanwhile():
            found = look()
        if found is None and self._resting:
            self._resting -= 1
        elif found is None and self._was_short and _OURS is not None:
            found = self._spin(look, started + SPIN_S)
        if found is None:
            found = sleep()
        self._was_short = time.perf_counter() - started < SPIN_S
        return found

    def _spin(self, look: Callable[[], T | None], deadline: float) -> T | None:
        switches = _switches()
        while (found := look()) is None and time.perf_counter() < deadline:
            os.sched_yield()
            if _switches() != switches:
                self._resting = self._rest
                self._rest = min(2 * self._rest + 1, _MAX_REST)
                return None
        self._rest = 0
        return found


def _switches() -> int:
    """Return how often this thread's core has gone to another one."""
    assert _OURS is not None
    usage = resource.getrusage(_OURS)
    return usage.ru_nivcsw + usage.ru_nvcsw
