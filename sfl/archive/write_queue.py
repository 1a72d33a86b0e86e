"""A queue of jobs that one background thread runs in order."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sfl.errors import RunError, reason_of

# Of unwritten data: beyond it, submit() blocks until the disk catches up.
MAX_PENDING_BYTES = 256 * 2**20


class _Job(NamedTuple):
    run: Callable[[], None]
    num_bytes: int
    submitted_at: float


class WriteQueue:
    """Runs jobs that write into a folder, on a background thread. Closed by ``close``.

    After the first failed job, no further ones run.

    Raises (from any method but ``close``, after a job failed):
        RunError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        """``root``: the folder, for messages."""
        self._root = root
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._num_done = 0
        self.num_submitted = 0  # jobs, done or not
        self.pending_bytes = 0  # of jobs that are not done
        self._longest_lag_s = 0.0
        self._failure: Exception | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None  # started by the first job

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread; raise nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, run: Callable[[], None], num_bytes: int = 0) -> int:
        """Queue a job, after waiting for room for its bytes; return its number, from 1."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.pending_bytes <= MAX_PENDING_BYTES or self._failure is not None
            )
            self._check()
            self.pending_bytes += num_bytes
            self._jobs.append(_Job(run, num_bytes, time.monotonic()))
            self.num_submitted += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
                self._thread.start()
            return self.num_submitted

    def wait_done(self, number: int) -> None:
        """Wait until the job with this number, and all before it, are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_done >= number or self._failure is not None)
        self._check()

    def take_lag_s(self) -> float:
        """Return the longest time from submitting a job to its end, since the last call."""
        with self._changed:
            lag_s, self._longest_lag_s = self._longest_lag_s, 0.0
        return lag_s

    def _check(self) -> None:
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or reason_of(self._failure)
            if name := getattr(self._failure, "filename", None):
                reason = f"{reason}: {name}"
            raise RunError(f"cannot write to {self._root}: {reason}") from self._failure

    def _work(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Wait for a job and run it; return False when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            if not self._jobs:
                return False
            job = self._jobs.popleft()
        try:
            if self._failure is None:
                job.run()
        except Exception as error:  # noqa: BLE001 - _check raises it
            self._failure = error
        with self._changed:
            self._num_done += 1
            self.pending_bytes -= job.num_bytes
            lag_s = time.monotonic() - job.submitted_at
            self._longest_lag_s = max(self._longest_lag_s, lag_s)
            self._changed.notify_all()
        return True
