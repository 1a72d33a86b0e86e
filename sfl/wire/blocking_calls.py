"""Blocking calls of conversations: made in place, or on threads while other conversations run."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sfl.wire.driver import Conversation

T = TypeVar("T")
MAX_THREADS = 16


class _Job(Generic[T]):
    """A call on its own thread."""

    def __init__(
        self, call: Callable[[], T], places: threading.Semaphore, wake: Callable[[], None]
    ):
        self._done = False
        self._result: T | None = None
        self._error: BaseException | None = None

        def run() -> None:
            with places:
                try:
                    self._result = call()
                except BaseException as error:  # noqa: BLE001 - the thread's edge; result raises it
                    self._error = error
            self._done = True
            wake()

        threading.Thread(target=run, name="call", daemon=True).start()

    def is_done(self) -> bool:
        return self._done

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Calls:
    """Makes blocking calls, on threads so that those of different conversations overlap.

    ``wake`` is called when a call has returned; without it, calls are made in place.
    """

    def __init__(
        self, wake: Callable[[], None] | None = None, max_threads: int = MAX_THREADS
    ) -> None:
        self.wake = wake
        self._places = threading.Semaphore(max_threads)
        self._once: dict[str, _Job[None] | None] = {}  # None: done in place

    def run(self, call: Callable[[], T]) -> Conversation[T]:
        """Make a call and return its result."""
        if self.wake is None:
            yield from ()
            return call()
        job = _Job(call, self._places, self.wake)
        yield job.is_done
        return job.result()

    def run_once(self, name: str, call: Callable[[], None]) -> Conversation[None]:
        """Make a call once for all conversations that use this name."""
        if self.wake is None:
            if name not in self._once:
                yield from self.run(call)
                self._once[name] = None
            return
        job = self._once.get(name) or _Job(call, self._places, self.wake)
        self._once[name] = job
        yield job.is_done
        job.result()
