"""How often something may be done: so often at once, and then every so many seconds."""

import time
from dataclasses import dataclass, field


@dataclass
class RateLimit:
    """So many at once; each is regained after ``every_s`` seconds."""

    at_once: int
    every_s: float
    _left: float = field(init=False)
    _counted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._counted_at = self.at_once, time.monotonic()

    def take(self) -> bool:
        """Say whether it may be done now; then it counts as done."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._counted_at) / self.every_s, self.at_once)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
