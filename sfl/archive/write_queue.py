"""What is to be written, and the one background thread that writes it in order."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sfl.errors import RunError, reason_of

# Of what waits to be written; whoever hands over more waits for the disk.
MAX_PENDING_BYTES = 256 * 2**20


class _Job(NamedTuple):
    run: Callable[[], None]
    num_bytes: int
    handed_over_at: float


class WriteQueue:
    """Run jobs that write into a folder on a background thread. Closed by ``close``.

    After the first job that fails no other is run.

    Raises (from any method, once it was met):
        RunError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        """``root``: the folder, for messages."""
        self._root = root
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._num_done = 0
        self.num_handed_over = 0  # jobs, done or not
        self.pending_bytes = 0  # of the jobs that are not done
        self._longest_lag_s = 0.0
        self._failure: Exception | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None  # started by the first job

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread; raises nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, run: Callable[[], None], num_bytes: int = 0) -> int:
        """Hand over a job once there is room for its bytes; return which job of all it is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.pending_bytes <= MAX_PENDING_BYTES or self._failure is not None
            )
            self._check()
            self.pending_bytes += num_bytes
            self._jobs.append(_Job(run, num_bytes, time.monotonic()))
            self.num_handed_over += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
                self._thread.start()
            return self.num_handed_over

    def wait_done(self, number: int) -> None:
        """Wait until so many jobs are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_done >= number or self._failure is not None)
        self._check()

    def take_lag_s(self) -> float:
        """Return how long, at most, a job took from its handing over, since the last call."""
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
        """Wait for a job and do it; False: there will be none."""
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
            lag_s = time.monotonic() - job.handed_over_at
            self._longest_lag_s = max(self._longest_lag_s, lag_s)
            self._changed.notify_all()
        return True
