"""How long a client pauses between its attempts to reach a lost server again."""

import time
from typing import Protocol

from sfl.archive.run_folder import say
from sfl.errors import SflError


class Reconnecting(Protocol):
    """A client that reconnects."""

    @property
    def progress(self) -> tuple[int, int]:
        """How often the server has started this client, and how many steps it has done."""

    @property
    def patience_s(self) -> float: ...

    @property
    def registered_s(self) -> float: ...


FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0


class Attempts:
    """Retries of a lost server: the pauses grow while the run makes no progress."""

    def __init__(self) -> None:
        self._num_starts = self._num_steps = -1
        self._pause_s = FIRST_PAUSE_S
        self._since = 0.0

    def pause_s(self, error: SflError, client: "Reconnecting") -> float:
        """Return how long to pause before the next attempt.

        Raises:
            SflError: ``error``, when the server has not resumed this client within ``patience_s``.
        """
        now, timeout_s, (num_starts, num_steps) = (
            time.monotonic(), client.patience_s, client.progress,
        )  # fmt: skip
        held = client.registered_s > LONGEST_PAUSE_S  # for example, waiting for other clients
        if num_starts != self._num_starts or held:
            self._num_starts, self._since = num_starts, now
        if num_steps != self._num_steps or held:
            self._num_steps, self._pause_s = num_steps, FIRST_PAUSE_S
        else:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        if now - self._since >= timeout_s:
            raise error
        say(f"{error}; trying for {timeout_s:g} seconds to reach the server again")
        return self._pause_s
