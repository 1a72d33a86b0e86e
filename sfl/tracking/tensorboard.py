"""``--track tensorboard``: event files that TensorBoard reads."""

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from sfl.tracking.tracked import TrackedRound, TrackedRun, title_of

BINS = 64  # of a histogram
ROUNDS, STEPS = "rounds", "steps"  # folders


class TensorBoard:
    """Writes two folders of event files: by round, and by a client's steps from the run's first.

    TensorBoard drops what a resumed run does again, by a folder's own count.
    """

    package: ClassVar[str] = "tensorboard"

    def __init__(self, *, histograms: int = 0) -> None:
        self.histograms = histograms
        self._num_before: Callable[[int], int] = lambda round_index: 0
        self._events: dict[str, _Events] = {}  # by the folder's name
        self._draw: Callable[[TrackedRound], Any] = lambda done: None

    def start(self, run: TrackedRun) -> str:
        from sfl.tracking.pictures import confusion_pixels

        folder, first = run.folder / "tensorboard", run.first_round
        self._num_before = run.num_before
        self._draw = functools.partial(confusion_pixels, run)
        for name, start in ((ROUNDS, first), (STEPS, run.num_before(first))):
            self._events[name] = _Events(folder / name, start)
        options = "\n".join(f"| {name} | {value} |" for name, value in run.config.items())
        table = f"| option | value |\n| --- | --- |\n{options}"
        self._events[ROUNDS].add_text("config", table, first)
        self._events[ROUNDS].flush()
        return f"look with: tensorboard --logdir {folder}"

    def add(self, done: TrackedRound) -> None:
        rounds, steps = self._events[ROUNDS], self._events[STEPS]
        for row in done.rows():
            rounds.add_number(title_of(row), row.value, done.index)
        for name, words in done.texts.items():
            rounds.add_text(f"round/{name}", words, done.index)
        for name, values in done.weights.items():
            rounds.add_histogram(f"weights/{name}", values, done.index)
        if (pixels := self._draw(done)) is not None:
            rounds.add_picture("round/confusion", pixels, done.index)
        for row in done.step_rows():
            at = self._num_before(done.index) + (row.step or 0)
            steps.add_number(title_of(row), row.value, at)
        for events in self._events.values():
            events.flush()

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Close the files; the last round's figures are in them."""
        for events in self._events.values():
            events.close()


class _Events:
    """An event file, written by the calling thread: errors of the disk are raised here.

    torch's SummaryWriter writes on a thread of its own, which ends in a traceback.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """``first``: from here on, TensorBoard drops what earlier files of the folder have."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._summaries: Any = summary
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        self._writer = RecordWriter(open(path, "xb"))  # noqa: SIM115 - see close
        self._event = Event
        self._write(file_version="brain.Event:2")
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._writer.write(event.SerializeToString())

    def add_number(self, tag: str, value: float, at: int) -> None:
        """Add a number as a float of 64 bits: counts of bytes are exact."""
        summary = self._summaries.scalar(tag, value, new_style=True, double_precision=True)
        self._write(step=at, summary=summary)

    def add_text(self, tag: str, words: str, at: int) -> None:
        self._write(step=at, summary=self._summaries.text(tag, words))

    def add_histogram(self, tag: str, values: Any, at: int) -> None:
        self._write(step=at, summary=self._summaries.histogram(tag, values.numpy(), BINS))

    def add_picture(self, tag: str, pixels: Any, at: int) -> None:
        """Add a picture: (height, width, channels) uint8."""
        self._write(step=at, summary=self._summaries.image(tag, pixels, dataformats="HWC"))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
