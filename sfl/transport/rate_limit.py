"""A rate limit with bursts."""

import time
from dataclasses import dataclass, field


@dataclass
class RateLimit:
    """Allow bursts of ``at_once``, and on average one every ``every_s`` seconds (token bucket)."""

    at_once: int
    every_s: float
    _left: float = field(init=False)
    _counted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._counted_at = self.at_once, time.monotonic()

    def take(self) -> bool:
        """Return whether it is allowed now; if so, count it."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._counted_at) / self.every_s, self.at_once)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
