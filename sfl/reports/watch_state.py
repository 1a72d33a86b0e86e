"""What a run's folder tells while the run goes on, or after it: read-only, from outside.

The folder may lie on a network file system, and each file may be in the middle of a change.
"""

import contextlib
import csv
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sfl.archive.live_status import MOST_COUNT, MOST_S, Status, read_status
from sfl.archive.round_log import read_summary
from sfl.archive.run_folder import (
    GO_ON,
    RUN_FAILED,
    RUN_OVER,
    RUN_STOPS,
    SERVER_LOG,
    resume_hint,
)
from sfl.errors import WAS_INTERRUPTED, IntegrityError, RunError
from sfl.files import strict_json
from sfl.files.regular_files import read_plain

SILENT_S = 30.0  # without a sign of life, a run counts as dead
TAIL_BYTES = 20_000  # of the log
MEAN_OF = 5  # rounds, for the time that is left
LEAST_SHARE, LEAST_S = 0.02, 1.0  # of the first round, before it says how long the run takes
# What a run is.
RUNNING, OVER, FAILED, SILENT = "running", "over", "failed", "silent"
STOPPED = "stopped"  # by its user, who may go on with it


class Line(NamedTuple):
    """A line of rounds.csv."""

    round_index: int  # from 0
    seconds: float
    figures: Mapping[str, float]  # its numbers, by column
    is_short: bool  # whether a client was missing

    @classmethod
    def of(cls, row: Mapping[str, str]) -> "Line":
        """Return what the cells of a line say.

        Raises:
            ValueError: they are no line of rounds.csv.
        """
        if None in row:
            raise ValueError("a line has more cells than the first")
        figures = {n: float(v) for n, v in row.items() if v and n not in ("took_part", "missing")}
        index, seconds = figures.get("round", -1.0), figures.get("seconds", -1.0)
        if not (0 <= index < MOST_COUNT and index == int(index) and 0 <= seconds <= MOST_S):
            raise ValueError("a line lacks its round, or its seconds")
        return cls(int(index), seconds, figures, bool(row.get("missing")))


@dataclass(frozen=True)
class Seen:
    """A run's folder at one moment."""

    path: Path
    config: Mapping[str, Any]
    rounds: Sequence[Line]  # of rounds.csv
    status: Status | None
    log: Sequence[str]  # its last lines
    log_written_at: float
    num_files: int  # of rounds, which a hop has instead of rounds.csv

    @property
    def num_rounds(self) -> int:
        """How many rounds the run has been asked for; 0 if that is not known."""
        found = self.config.get("rounds")
        return found if type(found) is int and 0 <= found < MOST_COUNT else 0

    @property
    def num_done(self) -> int:
        """How many rounds are finished."""
        return len(self.rounds) or (self.num_files if self.role else 0)

    @property
    def why_stopped(self) -> str:
        """Why the run has ended before its last round; "" if it has not."""
        stops = [line.partition(RUN_STOPS)[2] for line in self.log if RUN_STOPS in line]
        return stops[-1].partition(": ")[2] if stops and self.num_done < self.num_rounds else ""

    @property
    def written_at(self) -> float:
        """The last sign of life, in seconds since 1970."""
        return max(self.log_written_at, self.status.written_at if self.status else 0.0)

    @property
    def last_words(self) -> str:
        """The line with which the run has ended; "" while it goes on."""
        ends = (RUN_OVER, RUN_FAILED)
        words = [line[len("2026-01-01 00:00:00 ") :] for line in self.log[-2:]]
        if words and words[-1].startswith(GO_ON):
            words.pop()
        return words[-1] if words and words[-1].startswith(ends) else ""

    def state(self, silent_s: float) -> str:
        """Return what the run is, by how long ago its last sign of life was."""
        if words := self.last_words:
            if words.startswith(RUN_OVER):
                return OVER
            may_go_on = words.endswith(WAS_INTERRUPTED) and self._is_servers
            return STOPPED if may_go_on else FAILED
        return SILENT if silent_s > SILENT_S or self._is_dead() else RUNNING

    def _is_dead(self) -> bool:
        """Return whether its process is known to have ended, which this machine's are alone."""
        status = self.status
        if status is None or status.host != platform.node() or status.pid <= 0:
            return False
        try:
            os.kill(status.pid, 0)  # sends nothing
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    @property
    def _is_servers(self) -> bool:
        return "port" in self.config  # a simulation has none

    @property
    def role(self) -> str:
        """Which follower's folder it is: ``hop:1``, ``task:parity``; "" a server of all clients."""
        role = str(self.config.get("role", ""))
        return role if ":" in role else ""

    @property
    def how_to_go_on(self) -> str:
        """The command that resumes the run; "" if it cannot be."""
        if self.role and self._is_servers:
            return f"{GO_ON}the command that started this {self.role}"
        model = str(self.config.get("model", ""))
        return resume_hint(self.path, model)() if self._is_servers else ""

    @property
    def in_round(self) -> int:
        """The round that the run is in, from 0; a hop's is done when all have trained in it."""
        return self.status.now.round if self.status else -1

    @property
    def round_share(self) -> float:
        """How much of this round's training is done, from 0 to 1."""
        doings = self.status.now.clients.values() if self.status else ()
        of_steps = sum(doing.of_steps for doing in doings)
        return sum(doing.steps for doing in doings) / of_steps if of_steps else 0.0

    @property
    def left_s(self) -> float | None:
        """The time that the run's rounds are going to take; None if nothing tells."""
        status = self.status
        if status is None or status.now.round < 0:
            return None
        spent_s, left = status.written_at - status.round_began_at, self.num_rounds - self.num_done
        recent = [line.seconds for line in self.rounds[-MEAN_OF:]]
        if recent:
            mean_s = sum(recent) / len(recent)
            return mean_s * max(left - 1, 0) + max(mean_s - spent_s, 0.0)
        share = self.round_share
        tells = share >= LEAST_SHARE and spent_s >= LEAST_S
        return spent_s / share * left - spent_s if tells else None


def look(path: Path) -> Seen:
    """Return what a run's folder tells.

    Raises:
        RunError: it is no run's folder.
        IntegrityError: ``status.json`` or ``rounds.csv`` is damaged.
    """
    log, written_at = _tail(path / SERVER_LOG)
    status = read_status(path)
    rounds = _rounds(path)
    num_files = sum(1 for _ in path.glob("rounds/round_*.csv"))
    return Seen(path, _config(path), rounds, status, log, written_at, num_files)


def _tail(path: Path) -> tuple[list[str], float]:
    """Return the last lines of a log, and when it was written."""
    try:
        found = path.stat()
        data = read_plain(path, max(found.st_size - TAIL_BYTES, 0))
    except OSError as error:
        why = error.strerror or error
        raise RunError(
            f"{path.parent} is no folder of a server's run: {path.name}: {why}"
        ) from error
    lines = data.decode(errors="replace").splitlines()
    return lines[1:] if found.st_size > TAIL_BYTES else lines, found.st_mtime


def _config(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):  # not written yet
        found = strict_json.loads(read_plain(path / "config.json"))
        return found if isinstance(found, dict) else {}
    return {}


def _rounds(path: Path) -> list[Line]:
    try:
        return [Line.of(row) for row in read_summary(read_plain(path / "rounds.csv"))]
    except OSError:  # not written yet
        return []
    except (ValueError, csv.Error) as error:
        raise IntegrityError(f"{path / 'rounds.csv'}: is damaged: {error}") from error


def run_folder(name: str, out: Path) -> Path:
    """Return a run's folder by its path or name; "" for the run that was written last.

    Raises:
        RunError: there is no such run.
    """
    runs = out / "server"
    if name:
        for path in (Path(name), runs / name):
            if (path / SERVER_LOG).is_file():
                return path
        raise RunError(f"there is no run {name}, nor {runs / name}: give its folder, or see --out")
    logs = {path.stat().st_mtime: path.parent for path in runs.glob(f"*/{SERVER_LOG}")}
    if not logs:
        raise RunError(f"there is no run in {runs}: give a run's folder, or see --out")
    return logs[max(logs)]


class Watched:
    """A run that is looked at again and again; tells how long it has been silent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: tuple[float, float] | None = None  # written at, seen at on our clock

    def look(self) -> tuple[Seen, float]:
        """Return what the folder tells, and for how many seconds it has told nothing new.

        By the machines' clocks at first; after that by ours alone, which may differ from the run's.
        """
        seen, now = look(self._path), time.monotonic()
        if self._last is None:
            self._last = seen.written_at, now - max(time.time() - seen.written_at, 0.0)
        elif seen.written_at != self._last[0]:
            self._last = seen.written_at, now
        return seen, now - self._last[1]
