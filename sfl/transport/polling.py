"""Polling for a short time before a thread blocks; it exists for speed alone.

Waking a blocked thread takes a fraction of a millisecond and leaves its caches cold, which matters
where a step takes a few milliseconds. docs/performance.md has the gain.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 5e-3  # covers the peer's part of a small model's step


def poll(look: Callable[[], T]) -> T | None:
    """Call ``look`` until it does not raise BlockingIOError, for up to POLL_S; then return None."""
    give_up_at = time.perf_counter() + POLL_S
    while time.perf_counter() < give_up_at:
        with contextlib.suppress(BlockingIOError):
            return look()
        os.sched_yield()
    return None
