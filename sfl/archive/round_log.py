"""A run's metrics: a file per round, a line per round in ``rounds.csv``, a progress bar.

Every metric is defined in docs/metrics.md.
"""

import csv
import io
import itertools
import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sfl.archive.manifest import ROUND_LOG
from sfl.archive.run_folder import FIRST_STEP, RunFolder
from sfl.config import RunConfig
from sfl.files.atomic import write_file
from sfl.model.metrics import StepFigures
from sfl.model.task import Task
from sfl.model.topology import States
from sfl.tracking.tracked import TrackedRound
from sfl.tracking.tracking import Tracking
from sfl.values import Position
from sfl.wire.link import KINDS_DOWN, KINDS_UP

UP, DOWN = "bytes_up_{}", "bytes_down_{}"  # by kind, see link.KINDS
TRAFFIC = (
    "bytes_up", "bytes_down", "messages_up", "messages_down", "round_trips",
    *map(UP.format, KINDS_UP), *map(DOWN.format, KINDS_DOWN),
)  # fmt: skip
TIMES = (
    "seconds", "server_compute_s", "client_compute_s", "client_wait_s", "client_transfer_s",
)  # fmt: skip

# Of a round's file; round and step count from 0, as in its name; "" for what is of no step.
COLUMNS = ("client", "file", "metric", "value", "round", "step")


def round_figures(task: Task, by_link: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of a round's figures, in the order of ``rounds.csv``.

    ``by_link``: those of the bytes of tensors at further cuts.
    """
    trained = (f"train_{name}" for name in task.trained)
    evaluated = (f"{part}_{name}" for part in ("val", "test") for name in task.evaluated)
    return *trained, *evaluated, *TRAFFIC, *by_link, *TIMES


class Progress:
    """A bar over the steps of a round in a terminal; nothing elsewhere."""

    def __init__(self, run_rounds: int, *, shown: bool = True) -> None:
        self._rounds = run_rounds
        self._shown = shown
        self._bar: Any = None

    def start(self, round_index: int, num_steps: int) -> None:
        if not self._shown:
            return
        title = f"round {round_index + 1}/{self._rounds}"
        self._bar = tqdm(total=num_steps, desc=title, unit="step", leave=False, disable=None)

    def step(self, loss: float, num_steps: int = 1) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._bar.update(num_steps)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RoundLog:
    """The server's figures: collects those of a round, and writes them at its end."""

    def __init__(
        self,
        folder: RunFolder,
        rounds: int,
        task: Task,
        first_round: int = 0,
        by_link: Sequence[str] = (),
        *,
        tracking: Tracking,
    ) -> None:
        """``first_round``: where a run is resumed; lines of earlier rounds are kept.

        ``by_link``: as in ``round_figures``.
        """
        self._folder = folder
        self._rounds = rounds
        self._tracking = tracking
        self._has_begun = False
        self._task, names = task, round_figures(task, by_link)
        self._columns = ("round", *names, "took_part", "missing")
        # Of each client's steps, in order: loss, counts and samples, 8 bytes each.
        self._steps: dict[int, array[float]] = {}
        self._confusion: dict[int, Tensor] = {}  # of each client's test set in the round
        self.progress = Progress(rounds)
        self.figures: dict[str, float] = {}  # of the last round, by the columns of rounds.csv
        path = folder.path / "rounds.csv"
        rows = read_summary(path.read_bytes()) if first_round else []
        rows = [row for row in rows if int(row["round"]) < first_round]
        if rows:
            self.figures = read_figures(rows[-1], names)
        kept = [[row.get(name, "") for name in self._columns] for row in rows]
        write_file(path, _csv([self._columns, *kept]), durable=True)

    def __enter__(self) -> "RoundLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.progress.close()
        self._tracking.end(self.figures, failed=kind is not None)

    def start_round(self, round_index: int, num_steps: int) -> None:
        self._steps, self._confusion = {}, {}
        self.progress.start(round_index, num_steps)

    def _note_first_step(self) -> None:
        if not self._has_begun:
            self._folder.events.note(FIRST_STEP)
            self._tracking.start()
            self._has_begun = True

    def step(self, at: Position, figures: StepFigures) -> None:
        self._note_first_step()
        row = (figures.loss, *figures.counts, figures.samples)
        own, start = self._steps.setdefault(at.client, array("d")), len(row) * at.step
        assert len(own) >= start, "a step was left out"
        own[start : start + len(row)] = array("d", row)
        self.progress.step(figures.loss)

    def steps(self, client: int, table: Tensor) -> None:
        self._note_first_step()
        self._steps[client] = array("d", table.numpy().tobytes())
        self.progress.step(float(table[-1, 0]), len(table))

    def predicted(self, client: int, labels: Tensor, outputs: Tensor) -> None:
        if self._task.confusion and self._tracking.is_wanted:
            self._confusion[client] = self._task.confusion(outputs, labels)

    def num_steps(self, client: int) -> int:
        """Return how many steps of a client the round has so far."""
        return len(self._steps.get(client, ())) // (len(self._task.trained) + 1)

    def steps_so_far(self) -> dict[int, list[float]]:
        """Return the numbers of each client's steps in the round, for other ranks' logs."""
        return {client: list(own) for client, own in self._steps.items()}

    def add_steps(self, steps: Mapping[int, Sequence[float]]) -> None:
        """Log the steps of clients as another log, or this one, returned them."""
        self._steps |= {client: array("d", own) for client, own in steps.items()}

    def _rows(self, client: int) -> Iterator[tuple[float, ...]]:
        """Yield loss, counts and samples of each step of a client."""
        own = iter(self._steps.get(client, ()))
        return zip(*[own] * (len(self._task.trained) + 1), strict=True)

    def _step_metrics(self, client: int) -> Iterator[Mapping[str, float]]:
        for loss, *counts, samples in self._rows(client):
            yield self._task.metrics(loss, counts, samples)

    def _all_rows(self) -> Iterator[tuple[float, ...]]:
        return itertools.chain.from_iterable(map(self._rows, self._steps))

    def forget(self, client: int) -> None:
        """Remove the steps of a client whose part of the round is undone."""
        self._steps.pop(client, None)

    def say(self, line: str) -> None:
        """Write a line to the terminal and the log."""
        self._folder.events.say(line)

    def say_of_run(self, line: str) -> None:
        """Do as ``say``, for a line that is the same at all processes of a server."""
        self._folder.events.say_of_run(line)

    def train_figures(self) -> dict[str, float]:
        """Return the round's metrics over all steps, each weighted by its samples."""
        samples = sum(size for *_, size in self._all_rows())
        loss = math.fsum(loss * size for loss, *_, size in self._all_rows()) / samples
        counts = [sum(of) for of in zip(*(row[1:-1] for row in self._all_rows()), strict=True)]
        metrics = self._task.metrics(loss, counts, samples)
        return {f"train_{name}": value for name, value in metrics.items()}

    def end_round(
        self,
        round_index: int,
        clients: Mapping[int, Mapping[str, float]],
        overall: Mapping[str, float],
        took_part: Sequence[int],
        missing: Mapping[int, str],
        weights: States,
    ) -> None:
        """Write the round's file and its line of ``rounds.csv``, and tell the trackers.

        ``took_part``: clients in the round's order; ``missing``: absent clients, and why;
        ``weights``: the merged ones.
        """
        self.progress.close()
        archive = self._folder.archive
        self.write_round(round_index, clients, took_part)
        why = "; ".join(f"client_{k}: {reason}" for k, reason in sorted(missing.items()))
        who = ";".join(map(str, took_part))
        self.figures = dict(overall)
        row = {"round": round_index, **overall, "took_part": who, "missing": why}
        archive.append("rounds.csv", _csv([[row.get(name, "") for name in self._columns]]))
        self._folder.events.say_of_run(self._summary(round_index, overall))
        texts = {"took_part": who, "missing": why}
        self._tracking.add(lambda: self._tracked(round_index, clients, texts), weights)

    def write_round(
        self,
        round_index: int,
        clients: Mapping[int, Mapping[str, float]],
        took_part: Sequence[int],
    ) -> None:
        """Write the round's file: figures of its steps, and of its clients."""
        path = f"rounds/round_{round_index:03d}.csv"
        table = write_table(self._lines(round_index, clients))
        self._folder.archive.write(ROUND_LOG, path, table, round_index, tuple(took_part))

    def put_line(
        self, round_index: int, overall: Mapping[str, float], took_part: Sequence[int]
    ) -> None:
        """Write a round's line of ``rounds.csv``, or add figures to it; wait until it is on disk.

        For a server that is not told which figures are the round's last.
        """
        self.progress.close()
        path, index = self._folder.path / "rounds.csv", str(round_index)
        rows = read_summary(path.read_bytes())
        before: Mapping[str, object] = next((row for row in rows if row["round"] == index), {})
        who = ";".join(map(str, took_part))
        row = {**before, "round": index, **overall, "took_part": who, "missing": ""}
        kept: list[Mapping[str, object]] = [*(other for other in rows if other["round"] != index)]
        lines = [[own.get(name, "") for name in self._columns] for own in [*kept, row]]
        write_file(path, _csv([self._columns, *lines]), durable=True)
        self.figures = dict(overall)
        new = {name: value for name, value in overall.items() if str(value) != before.get(name)}
        self._folder.events.say(self._summary(round_index, new))

    def _tracked(
        self,
        round_index: int,
        clients: Mapping[int, Mapping[str, float]],
        texts: Mapping[str, str],
    ) -> TrackedRound:
        """Return a round's figures for the trackers: those of its files."""
        steps = {k: list(self._step_metrics(k)) for k in self._steps}
        told = {name: text for name, text in texts.items() if text}
        tested = sum(self._confusion.values(), torch.tensor(0)) if self._confusion else None
        return TrackedRound(round_index, self.figures, told, clients, steps, confusion=tested)

    def _summary(self, round_index: int, overall: Mapping[str, float]) -> str:
        metric, title = self._task.shown
        titles = {
            "train_loss": "training loss", "val_loss": "validation loss",
            f"val_{metric}": f"validation {title}", f"test_{metric}": f"test {title}",
        }  # fmt: skip
        there = (f" {titles[name]} {overall[name]:.4f}," for name in titles if name in overall)
        seconds = f"{overall['seconds']:.1f} s"
        return f"round {round_index + 1}/{self._rounds}:{''.join(there)} {seconds}"

    def _lines(
        self, round_index: int, clients: Mapping[int, Mapping[str, float]]
    ) -> Iterator[tuple[object, ...]]:
        """Yield the lines of a round's file, see ``write_table``."""
        for client, metrics in sorted(clients.items()):
            for step, of_step in enumerate(self._step_metrics(client)):
                name = f"labels_{round_index}_{step}.pt"
                for metric, value in of_step.items():
                    yield client, name, metric, value, round_index, step
            name = f"client_model_{round_index:03d}.pt"
            for metric, value in metrics.items():
                yield client, name, metric, value, round_index, ""


class ClientLog:
    """A client's progress bar, and its line of figures per round."""

    def __init__(self, task: Task, run: RunConfig, folder: RunFolder, *, shows_bar: bool) -> None:
        self.run = run
        self._shown = task.shown
        self._events = folder.events
        self.start_over()
        self.progress = Progress(run.rounds, shown=shows_bar)
        self.num_steps = 0  # taken so far, including repeated ones

    def say(self, line: str) -> None:
        """Write a line to the terminal and the log."""
        self._events.say(line)

    def start_over(self) -> None:
        """Discard the figures of a round that is over, or started again."""
        self._loss_sum, self._samples, self._trains = 0.0, 0, False

    def start_round(self, round_index: int, num_steps: int) -> None:
        self.progress.start(round_index, num_steps)

    def step(self, at: Position, figures: StepFigures) -> None:
        self._loss_sum += figures.loss * figures.samples
        self._samples += figures.samples
        self._count(figures.loss)

    def untold_step(self, at: Position) -> None:
        """Count a step whose figures are not told us."""
        self._count(math.nan)

    def _count(self, loss: float) -> None:
        if self.num_steps == 0:
            self._events.note(FIRST_STEP)
        self.num_steps += 1
        self._trains = True
        self.progress.step(loss)

    def end_round(self, round_index: int, figures: Mapping[str, float]) -> None:
        self.progress.close()
        told = self._samples > 0
        own = {"training loss": self._loss_sum / self._samples} if told else {}
        metric, title = self._shown
        titles = {"val_loss": "validation loss", f"val_{metric}": f"validation {title}"}
        titles |= {"test_loss": "test loss", f"test_{metric}": f"test {title}"}
        own |= {title: figures[name] for name, title in titles.items() if name in figures}
        shown = ", ".join(f"{title} {value:.4f}" for title, value in own.items())
        took = "own" if self._trains else "sat out; own"
        self._events.say(f"round {round_index + 1}/{self.run.rounds}: {took} {shown}")
        self.start_over()


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as CSV; floats read back as the same float."""
    data = io.BytesIO()
    with io.TextIOWrapper(data, "utf-8", newline="") as text:
        csv.writer(text, lineterminator="\n").writerows(rows)
        text.flush()
        return data.getvalue()


def write_table(rows: Iterable[Sequence[object]]) -> bytes:
    """Return the content of a round's file, whose rows have these ``COLUMNS``."""
    return _csv(itertools.chain([COLUMNS], rows))


def read_round(data: bytes) -> dict[tuple[int, str, str], float]:
    """Return a round's file as (client, file, metric) -> value.

    Older files lack the columns ``round`` and ``step``, which ``file`` tells as well.
    """
    lines = csv.DictReader(io.StringIO(data.decode()))
    return {(int(r["client"]), r["file"], r["metric"]): float(r["value"]) for r in lines}


def read_figures(row: Mapping[str, str], names: Collection[str]) -> dict[str, float]:
    """Return those of these figures that a line of ``rounds.csv`` has."""
    return {name: float(row[name]) for name in names if row.get(name)}


def read_summary(data: bytes) -> list[dict[str, str]]:
    """Return the complete lines of ``rounds.csv``."""
    whole = data[: data.rfind(b"\n") + 1]
    return list(csv.DictReader(io.StringIO(whole.decode())))
