"""``--profile``: the time of each phase of a round's steps, one line per client and round.

Each side writes its own ``profile.csv``. A phase ends where the next begins:

========= ======================================== ================================
phase     client                                   server
========= ======================================== ================================
batch     draw and augment the next one
forward   the front                                the back, forward and backward
serialise labels and activations into files        gradients into a file
send      hand files to the system                 hand files to the system
wait      for gradients, when the batch is made
load      check gradients, make them a tensor      the same of labels, activations
backward  the front
update    the optimiser's step                     the same
archive   hand files to the archive, log           the same
========= ======================================== ================================
"""

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfl.archive.writer import ArchiveWriter
from sfl.values import Position
from sfl.wire.link import Link

PHASES = (
    "batch", "forward", "serialise", "send", "wait", "load", "backward", "update", "archive",
)  # fmt: skip
COLUMNS = (
    "round", "client", "steps", "started_at", "seconds", "cpu_at", "cpu_s", "bytes_sent",
    "bytes_received", "round_trips", "archive_lag_s",
    *(f"{phase}_s" for phase in PHASES),
)  # fmt: skip


class Stopwatch:
    """Measures the seconds spent in each phase since ``clear``."""

    def __init__(self) -> None:
        self._since = 0.0
        self.clear()

    def clear(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.start()

    def start(self) -> None:
        """Start measuring; the time since the last ``lap`` counts for no phase."""
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase; the next one starts."""
        now = time.perf_counter()
        self.spent[phase] += now - self._since
        self._since = now


class Profile:
    """Writes ``profile.csv`` into a run's folder, if ``wanted``."""

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        self._path = folder / "profile.csv" if wanted else None

    @contextmanager
    def round(
        self, at: Position, num_steps: int, clock: Stopwatch, link: Link, archive: ArchiveWriter
    ) -> Iterator[None]:
        """Measure a client's steps in a round, and write a line.

        ``started_at``: time of day; ``cpu_at``, ``cpu_s``: processor time of the whole process
        until then, and since; ``bytes_sent``, ``bytes_received``, ``round_trips``: of the link;
        ``archive_lag_s``: longest time from handing a file to the archive until it is written.
        """
        clock.clear()
        if self._path is None:
            yield
            return
        started_at, started = time.time(), time.perf_counter()
        cpu, before = time.process_time(), link.counters.copy()
        yield
        now = link.counters
        row = (
            at.round, at.client, num_steps, started_at,
            time.perf_counter() - started, cpu, time.process_time() - cpu,
            now.bytes_sent - before.bytes_sent, now.bytes_received - before.bytes_received,
            now.round_trips - before.round_trips, archive.take_lag_s(), *clock.spent.values(),
        )  # fmt: skip
        is_new = not self._path.exists()
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, row] if is_new else [row])
