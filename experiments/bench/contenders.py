"""Who takes part in ``experiments.bench``: processes that train when it is their turn.

All live at the same time, and rest (SIGSTOP) while it is another's turn.
"""

import contextlib
import csv
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Protocol

from experiments.bench.rows import Row
from experiments.bench.transports import TCP, Commands, Plan
from experiments.support.process_tree import Tree
from experiments.support.processes import ROOT, last_line
from sfl.archive.profile import PHASES
from sfl.errors import RunError

START_S = 120.0  # until all have started; Ray takes long
END_S = 15.0  # for one that is told to end to do so
STEP_S = 60.0  # a step that takes longer will not come
BLOCK_ROUNDS = 2  # of ours that count in a block; one comes before that was stopped half-way


@dataclass(frozen=True)
class Sample:
    """What a step took in one block; where there are several clients, one step of each."""

    seconds: float
    cpu_s: float  # of all processes
    num_bytes: float | None = None  # of one client, up and down; None: not known
    round_trips: float | None = None
    archive_lag_s: float | None = None  # the longest that a tensor waited to be on disk
    client_s: dict[str, float] = field(default_factory=dict)  # by phase, see sfl.archive.profile
    server_s: dict[str, float] = field(default_factory=dict)


def mean_seconds(samples: Sequence[Sample]) -> float:
    return fmean(sample.seconds for sample in samples)


class Contender(Protocol):
    """One way to train what a row says."""

    title: str

    def block(self, num_steps: int) -> list[Sample]:
        """Train for about so many steps."""

    def peak_bytes(self) -> int: ...


class Peer:
    """A program of ``experiments.bench.peers``."""

    def __init__(
        self, stack: contextlib.ExitStack, title: str, module: str, row: Row, folder: Path
    ) -> None:
        self.title = title
        self._log = folder / f"{module}.err"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        address = str(folder / f"{module}.sock")
        listener.bind(address)
        listener.listen()
        listener.settimeout(0.2)
        command = [sys.executable, "-m", f"experiments.bench.peers.{module}", address]
        command += [*row.run_options(), "--rounds", "1000000"]
        with open(self._log, "w") as errors:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
        self._tree = Tree(self._process.pid)
        stack.callback(self._end)
        self._clients: list[Connection] = []
        deadline = time.monotonic() + START_S
        while len(self._clients) < (1 if module == "alone" else row.clients):
            with contextlib.suppress(TimeoutError):
                connected, _ = listener.accept()
                connected.setblocking(True)
                self._clients.append(Connection(connected.detach()))
            self._check(deadline)
        self._receive(deadline)  # which client each is: all have started
        self._tree.signal(signal.SIGSTOP)

    def _check(self, deadline: float) -> None:
        if self._process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"{self.title}: {last_line(self._log)}")

    def _receive(self, deadline: float) -> list[tuple[float, int]]:
        for client in self._clients:
            while not client.poll(0.2):
                self._check(deadline)
        return [client.recv() for client in self._clients]

    def block(self, num_steps: int) -> list[Sample]:
        cpu_s = self._tree.cpu_s()
        with self._tree.turn():
            started = time.perf_counter()
            for client in self._clients:
                client.send(num_steps)
            sizes = [size for _, size in self._receive(started + num_steps * STEP_S)]
            seconds = time.perf_counter() - started
        cpu_s = self._tree.cpu_s() - cpu_s
        num_bytes = sizes[0] / num_steps if any(sizes) else None
        return [Sample(seconds / num_steps, cpu_s / num_steps, num_bytes)]

    def peak_bytes(self) -> int:
        return self._tree.peak_bytes()

    def _end(self) -> None:
        self._tree.signal(signal.SIGCONT)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            for client in self._clients:
                client.send(0)
            self._process.wait(END_S)
        self._tree.end()
        self._process.wait()


class Sfl:
    """Our own server and clients, as a user starts them."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        title: str,
        row: Row,
        folder: Path,
        server_options: Sequence[str],
        client_options: Sequence[str] = (),
        *,
        over: Callable[[Plan], Commands] = TCP,
    ) -> None:
        self.title = title
        name = re.sub("[^A-Za-z0-9]+", "-", title)
        own = folder / f"logs-{name}"
        own.mkdir()
        out = ["--out", str(folder), "--profile", "--peer-timeout", "3600"]
        server = [*row.run_options(), "--run", name, *out, *server_options]
        self._log = own / "errors"
        self._processes = []
        for command in over(Plan(row.clients, server, [*out, *client_options], own)):
            with open(self._log, "a") as errors:
                self._processes.append(
                    subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
                )
        self._tree = Tree(*(process.pid for process in self._processes))
        stack.callback(self._end)
        self._server = folder / "server" / name / "profile.csv"
        self._clients = [
            folder / "client" / name / f"client_{k}" / "profile.csv" for k in range(row.clients)
        ]
        self._wait_for_rounds(1)
        self._tree.signal(signal.SIGSTOP)

    def _num_rounds(self) -> int:
        """Return how many rounds' steps are done."""
        own = min(map(_num_rows, self._clients))
        return min(own, _num_rows(self._server) // len(self._clients))

    def _wait_for_rounds(self, wanted: int) -> None:
        while self._num_rounds() < wanted:
            if any(process.poll() is not None for process in self._processes):
                raise RunError(f"{self.title}: {last_line(self._log)}")
            time.sleep(0.01)

    def _end(self) -> None:
        self._tree.end()
        for process in self._processes:
            process.wait()

    def block(self, num_steps: int) -> list[Sample]:
        first = self._num_rounds() + 1  # that counts
        with self._tree.turn():
            self._wait_for_rounds(first + BLOCK_ROUNDS)
        return [self._sample(index) for index in range(first, first + BLOCK_ROUNDS)]

    def _sample(self, index: int) -> Sample:
        clients = [_rows(path)[index] for path in self._clients]
        round_index = clients[0]["round"]
        server = [row for row in _rows(self._server) if row["round"] == round_index]
        num_steps = max(row["steps"] for row in clients)
        num_bytes = clients[0]["bytes_sent"] + clients[0]["bytes_received"]
        cpu_s = sum(row["cpu_s"] for row in clients) + _span(server, "cpu_at", "cpu_s")
        return Sample(
            _span(server, "started_at", "seconds") / num_steps,
            cpu_s / num_steps,
            num_bytes / num_steps,
            clients[0]["round_trips"] / num_steps,
            max(row["archive_lag_s"] for row in server),
            _phases(clients, num_steps),
            _phases(server, num_steps),
        )

    def peak_bytes(self) -> int:
        return self._tree.peak_bytes()


def _num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def _rows(path: Path) -> list[dict[str, float]]:
    """Return the whole lines of a ``profile.csv``."""
    if not path.exists():
        return []
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def _span(rows: Sequence[dict[str, float]], begins: str, lasts: str) -> float:
    """Return how long it is from the first beginning to the last end."""
    return max(row[begins] + row[lasts] for row in rows) - min(row[begins] for row in rows)


def _phases(rows: Sequence[dict[str, float]], num_steps: float) -> dict[str, float]:
    """Return the mean seconds that a client's step spent in each phase."""
    total = num_steps * len(rows)
    return {phase: sum(row[f"{phase}_s"] for row in rows) / total for phase in PHASES}
