"""Show that the server lives while it waits for clients.

In the log, and where the output is no terminal, a line at growing intervals; on a terminal one line
that is refreshed.
"""

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from sfl.archive.run_folder import EventLog
from sfl.errors import duration

FIRST_S = (10.0, 60.0)  # after so long the log says it for the first times
EVERY_S = 600.0  # and then


class WaitingNotice:
    """Says whom the server waits for, and for how long; after a ``with`` block no line is left."""

    def __init__(self, events: EventLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._clock = events, clock
        self._since: float | None = None
        self._num_said = 0
        self._bar: Any = None

    def __enter__(self) -> "WaitingNotice":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def update(self, line: str) -> bool:
        """Show the line; call it about twice a second. "": the server waits for nobody.

        Return whether the line went into the log, so that it is time to tell the others.
        """
        if not line:
            self.end()
            return False
        now = self._clock()
        if self._since is None:
            self._since = now
            self._bar = tqdm(bar_format="{desc}", leave=False, disable=None, dynamic_ncols=True)
        waited_s = now - self._since
        self._bar.set_description_str(f"{duration(waited_s)}: {line}")  # cut at the right edge
        if waited_s < self._due_s():
            return False
        while waited_s >= self._due_s():
            self._num_said += 1
        say = self._events.say if self._bar.disable else self._events.note
        say(f"{line}; for {duration(waited_s)}")
        return True

    def end(self) -> None:
        """Remove the line from the terminal."""
        if self._bar is not None:
            self._bar.close()
            if not self._bar.disable:
                # Below a progress bar, tqdm leaves the cursor at the right.
                self._bar.fp.write("\r")
        self._since, self._num_said, self._bar = None, 0, None

    def _due_s(self) -> float:
        if self._num_said < len(FIRST_S):
            return FIRST_S[self._num_said]
        return EVERY_S * (self._num_said - len(FIRST_S) + 1)
