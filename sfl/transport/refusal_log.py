"""Who is turned away: one line each, on the server's console and in its log, but not of a crowd."""

import contextlib
import threading
import time
from collections.abc import Callable

from sfl.wire.link import one_line

Tell = Callable[[str], None]
EVERY_S = 60.0
SAID_AT_ONCE, NOTED_AT_ONCE = 10, 50  # on the console, in the log


def _nowhere(line: str) -> None:
    return


class RefusalLog:
    """Lines about who is turned away; may be told by several threads."""

    def __init__(self, say: Tell = _nowhere, note: Tell = _nowhere) -> None:
        """``say`` writes a line to the console and into the log, ``note`` into the log alone."""
        self._say, self._note = say, note
        self._lock = threading.Lock()
        self._began_at = time.monotonic()
        self._said = self._noted = self._unsaid = self._untold = 0

    def add(self, address: str, reason: str, *, aloud: bool = True) -> None:
        """Tell of one; not ``aloud``: into the log alone, as of who left without a word."""
        line = f"turned away {address}: {one_line(reason)}"
        with self._lock:
            if aloud and self._said < SAID_AT_ONCE:
                self._said += 1
                _tell(self._say, line)
                return
            self._unsaid += aloud
            if self._noted < NOTED_AT_ONCE:
                self._noted += 1
                _tell(self._note, line)
            else:
                self._untold += 1

    def summarise(self, now: float) -> None:
        """Count, once in a while, those who had no line of their own."""
        with self._lock:
            if now - self._began_at < EVERY_S:
                return
            for tell, count in ((self._say, self._unsaid), (self._note, self._untold)):
                if count:
                    _tell(tell, f"turned away {count} more connections in {EVERY_S:g} seconds")
            self._began_at = now
            self._said = self._noted = self._unsaid = self._untold = 0


def _tell(tell: Tell, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the disk is full, or the log is closed
        tell(line)
