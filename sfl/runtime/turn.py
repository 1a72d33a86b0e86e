"""Whose turn it is to compute, of several clients that one process hosts.

Dropout draws from torch's one generator, and one core is shared anyway: so one client computes at a
time, and gives the turn away while it waits for its server or sends.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """Held by ``with`` while a client computes; it is the thread's that took it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._owner = None
        self._lock.release()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Give the turn away, and take it again at the end; nothing for a thread without it."""
        if self._owner != threading.get_ident():
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
