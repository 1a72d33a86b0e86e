"""Lines about refused connections, on the server's console and in its log, at a limited rate."""

import contextlib
import threading
import time
from collections.abc import Callable

from sfl.wire.link import one_line

Tell = Callable[[str], None]
EVERY_S = 60.0
MAX_CONSOLE_LINES, MAX_LOG_LINES = 10, 50  # on the console, in the log


def _discard(line: str) -> None:
    return


class RefusalLog:
    """Lines about refused connections; safe to use from several threads."""

    def __init__(self, say: Tell = _discard, note: Tell = _discard) -> None:
        """``say`` writes a line to console and log, ``note`` to the log alone."""
        self._to_console, self._to_log = say, note
        self._lock = threading.Lock()
        self._began_at = time.monotonic()
        self._console_lines = self._log_lines = self._console_omitted = self._log_omitted = 0

    def add(self, address: str, reason: str, *, on_console: bool = True) -> None:
        """Report one refused connection; without ``on_console``, in the log alone."""
        line = f"turned away {address}: {one_line(reason)}"
        with self._lock:
            if on_console and self._console_lines < MAX_CONSOLE_LINES:
                self._console_lines += 1
                _tell(self._to_console, line)
                return
            self._console_omitted += on_console
            if self._log_lines < MAX_LOG_LINES:
                self._log_lines += 1
                _tell(self._to_log, line)
            else:
                self._log_omitted += 1

    def summarise(self, now: float) -> None:
        """Every ``EVERY_S``, report how many refusals had no line of their own."""
        with self._lock:
            if now - self._began_at < EVERY_S:
                return
            for tell, count in (
                (self._to_console, self._console_omitted),
                (self._to_log, self._log_omitted),
            ):
                if count:
                    _tell(tell, f"turned away {count} more connections in {EVERY_S:g} seconds")
            self._began_at = now
            self._console_lines = self._log_lines = self._console_omitted = self._log_omitted = 0


def _tell(tell: Tell, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the disk is full, or the log is closed
        tell(line)
