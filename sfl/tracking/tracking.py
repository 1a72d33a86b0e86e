"""Hand a run's figures to its trackers, which can neither end nor slow it."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sfl.errors import reason_of
from sfl.tracking.tracked import TrackedRound, TrackedRun, Tracker

MOST_WAITING = 100  # rounds that a tracker may lie behind
END_S = 30.0  # that a run's end waits for its trackers: an upload takes some
FAILED_END_S = 5.0  # the same of a run that fails: its peers are to be told
Say = Callable[[str], None]


class Tracking:
    """The trackers of a run, each on a background thread of its own.

    What they have to say is said when a round ends.
    """

    def __init__(self, trackers: Mapping[str, Tracker], run: TrackedRun | None, say: Say) -> None:
        """``run``: None if there are no trackers."""
        self._workers = {name: _Worker(name, tracker) for name, tracker in trackers.items()}
        self._run = run
        self._say = say

    @property
    def is_wanted(self) -> bool:
        """Whether there is a tracker."""
        return bool(self._workers)

    def start(self) -> None:
        for worker in self._workers.values():
            assert self._run is not None
            worker.start(self._run)

    def add(
        self, make: Callable[[], TrackedRound], weights: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Hand on a round's figures, with the merged weights of each segment if they are wanted."""
        if not self.is_wanted:
            return
        done = make()
        if any(worker.wants_weights(done.index) for worker in self._workers.values()):
            done = replace(done, weights=_copied(weights))
        for worker in self._workers.values():
            worker.add(done)
        self._report()

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """End all trackers; one that takes too long is left behind."""
        until = time.monotonic() + (FAILED_END_S if failed else END_S)
        for worker in self._workers.values():
            worker.submit(lambda tracker: tracker.end(summary, failed=failed), is_last=True)
        for worker in self._workers.values():
            worker.join(until - time.monotonic())
        with contextlib.suppress(OSError):  # on a full disk, the error that ends the run is raised
            self._report()

    def _report(self) -> None:
        for worker in self._workers.values():
            while not worker.said.empty():
                self._say(worker.said.get())


class _Worker:
    """A tracker and its thread; after a failure it does nothing."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker = tracker
        self._jobs: queue.Queue[tuple[Callable[[Tracker], None], bool]] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
        self._is_over = False
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wants_weights(self, round_index: int) -> bool:
        every = self._tracker.histograms
        return every > 0 and (round_index + 1) % every == 0 and not self._is_over

    def start(self, run: TrackedRun) -> None:
        def start(tracker: Tracker) -> None:
            run.folder.mkdir(parents=True, exist_ok=True)
            self.said.put(f"--track {self._name}: {tracker.start(replace(run, say=self.said.put))}")

        self._thread.start()
        self.submit(start)

    def add(self, done: TrackedRound) -> None:
        kept = done if self.wants_weights(done.index) else replace(done, weights={})
        self.submit(lambda tracker: tracker.add(kept))

    def submit(self, job: Callable[[Tracker], None], *, is_last: bool = False) -> None:
        if self._is_over:
            return
        try:
            self._jobs.put_nowait((job, is_last))
        except queue.Full:
            self._fail("it does not keep up")

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, if it was started."""
        if self._thread.ident is None:
            return
        self._thread.join(max(timeout_s, 0.0))
        if self._thread.is_alive() and not self._is_over:
            self._fail("it takes too long to end")

    def _work(self) -> None:
        is_last = False
        while not (is_last or self._is_over):
            job, is_last = self._jobs.get()
            try:
                job(self._tracker)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a thread's edge
                self._fail(reason_of(error))

    def _fail(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self.said.put(f"warning: --track {self._name}: {reason}; going on without it")


def _copied(segments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the finite values of each weight, which training goes on to change."""
    copies = {
        f"{name}/{key}": value.detach().to("cpu", torch.float32, copy=True).flatten()
        for name, state in segments.items()
        for key, value in state.items()
        if value.is_floating_point()
    }
    finite = {name: values[values.isfinite()] for name, values in copies.items()}
    return {name: values for name, values in finite.items() if len(values)}
