"""The figures of a run: a file a round, a line a round, a progress bar.

Every metric is defined in the README.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from sfl.archive import ROUND_LOG
from sfl.archive_writer import write_file
from sfl.config import RunConfig
from sfl.link import KINDS_DOWN, KINDS_UP
from sfl.metrics import StepFigures
from sfl.protocol import Position
from sfl.runfolder import RunFolder

EVALUATED = ("loss", "acc", "balanced_acc", "macro_f1", "weighted_f1")
UP, DOWN = "bytes_up_{}", "bytes_down_{}"  # and what was carried
TRAFFIC = (
    "bytes_up", "bytes_down", "messages_up", "messages_down", "round_trips",
    *map(UP.format, KINDS_UP), *map(DOWN.format, KINDS_DOWN),
)  # fmt: skip
ROUND_COLUMNS = (
    "round", "train_loss", "train_acc", *(f"val_{n}" for n in EVALUATED),
    *(f"test_{n}" for n in EVALUATED), *TRAFFIC, "seconds", "server_compute_s",
    "client_compute_s", "client_wait_s", "client_transfer_s",
)  # fmt: skip


class Progress:
    """A bar over the steps of a round in a terminal; nothing elsewhere."""

    def __init__(self, run_rounds: int) -> None:
        self._rounds = run_rounds
        self._bar: Any = None

    def start(self, round_index: int, num_steps: int) -> None:
        title = f"round {round_index + 1}/{self._rounds}"
        self._bar = tqdm(total=num_steps, desc=title, unit="step", leave=False, disable=None)

    def step(self, figures: StepFigures) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(loss=f"{figures.loss:.3f}", refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RoundLog:
    """The server's figures: collects those of a round and writes them when it ends."""

    def __init__(self, folder: RunFolder, rounds: int, first_round: int = 0) -> None:
        """A run that goes on keeps the lines of the rounds before ``first_round``."""
        self._folder = folder
        self._rounds = rounds
        self._steps: dict[int, list[tuple[int, StepFigures]]] = {}
        self.progress = Progress(rounds)
        path = folder.path / "rounds.csv"
        header = _csv([ROUND_COLUMNS])
        kept = path.read_bytes().splitlines(keepends=True)[: 1 + first_round] if first_round else []
        write_file(path, b"".join(kept) or header)

    def start_round(self, round_index: int, num_steps: int) -> None:
        self._steps = {}
        self.progress.start(round_index, num_steps)

    def step(self, at: Position, figures: StepFigures) -> None:
        self._steps.setdefault(at.client, []).append((at.step, figures))
        self.progress.step(figures)

    def train_figures(self) -> dict[str, float]:
        """Return the round's loss and accuracy over all steps, each weighted by its samples."""
        steps = [figures for of_client in self._steps.values() for _, figures in of_client]
        samples = sum(f.samples for f in steps)
        loss = math.fsum(f.loss * f.samples for f in steps) / samples
        return {"train_loss": loss, "train_acc": sum(f.correct for f in steps) / samples}

    def end_round(
        self,
        round_index: int,
        clients: Mapping[int, Mapping[str, float]],
        overall: Mapping[str, float],
    ) -> None:
        """Write the round's file and its line of ``rounds.csv``."""
        self.progress.close()
        rows: list[tuple[object, ...]] = []
        for client, metrics in sorted(clients.items()):
            for step, figures in self._steps.get(client, []):
                name = f"labels_{round_index}_{step}.pt"
                rows.append((client, name, "loss", figures.loss))
                rows.append((client, name, "acc", figures.correct / figures.samples))
            name = f"client_model_{round_index:03d}.pt"
            rows.extend((client, name, metric, value) for metric, value in metrics.items())
        path = f"rounds/round_{round_index:03d}.csv"
        self._folder.archive.write(ROUND_LOG, path, write_table(rows), round_index)
        row = {"round": round_index, **overall}
        self._write_summary_row([row.get(name, "") for name in ROUND_COLUMNS])
        self._folder.events.say(_summary(round_index, self._rounds, overall))

    def _write_summary_row(self, row: Sequence[object]) -> None:
        with open(self._folder.path / "rounds.csv", "ab") as stream:
            stream.write(_csv([row]))


class ClientLog:
    """A client's progress bar and its line a round."""

    def __init__(self, run: RunConfig, folder: RunFolder, steps_an_epoch: int) -> None:
        self._run = run
        self._events = folder.events
        self._num_steps = steps_an_epoch * run.local_epochs
        self._loss_sum = 0.0
        self._samples = 0
        self.progress = Progress(run.rounds)

    def step(self, at: Position, figures: StepFigures) -> None:
        if at.step == 0:
            self.progress.start(at.round, self._num_steps)
        self._loss_sum += figures.loss * figures.samples
        self._samples += figures.samples
        self.progress.step(figures)

    def end_round(self, round_index: int, figures: Mapping[str, float]) -> None:
        self.progress.close()
        trained = self._samples > 0
        own = {"training loss": self._loss_sum / self._samples} if trained else {}
        self._loss_sum, self._samples = 0.0, 0
        titles = {"val_loss": "validation loss", "val_acc": "validation accuracy"}
        titles |= {"test_loss": "test loss", "test_acc": "test accuracy"}
        own |= {title: figures[name] for name, title in titles.items() if name in figures}
        shown = ", ".join(f"{title} {value:.4f}" for title, value in own.items())
        took = "own" if trained else "sat out; own"
        self._events.say(f"round {round_index + 1}/{self._run.rounds}: {took} {shown}")


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    """Return rows as CSV; floats as ``repr`` gives them, which reads back as the same float."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def write_table(rows: Sequence[Sequence[object]]) -> bytes:
    """Return a round's file: what it says of each client and file."""
    return _csv([("client", "file", "metric", "value"), *rows])


def _summary(round_index: int, rounds: int, overall: Mapping[str, float]) -> str:
    shown = [f"round {round_index + 1}/{rounds}:"]
    for metric, title in (
        ("train_loss", "training loss"), ("val_loss", "validation loss"),
        ("val_acc", "validation accuracy"), ("test_acc", "test accuracy"),
    ):  # fmt: skip
        if metric in overall:
            shown.append(f"{title} {overall[metric]:.4f},")
    return " ".join(shown) + f" {overall['seconds']:.1f} s"


def read_round(data: bytes) -> dict[tuple[int, str, str], float]:
    """Return a round's file as (client, file, metric) -> value."""
    lines = csv.DictReader(io.StringIO(data.decode()))
    return {(int(r["client"]), r["file"], r["metric"]): float(r["value"]) for r in lines}
