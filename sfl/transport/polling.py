"""Polling for a while before a thread blocks: what is here for speed alone.

A thread that the system has to wake begins a fraction of a millisecond late, with cold caches,
which counts where a step takes a few of them. docs/performance.md says what it gains.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 5e-3  # the other side's part of a small model's step


def poll(look: Callable[[], T]) -> T | None:
    """Call ``look`` until it does not raise BlockingIOError, for up to POLL_S; then return None."""
    give_up_at = time.perf_counter() + POLL_S
    while time.perf_counter() < give_up_at:
        with contextlib.suppress(BlockingIOError):
            return look()
        os.sched_yield()
    return None
