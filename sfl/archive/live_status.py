"""``status.json``: what a run does at the moment, for whoever looks into its folder from outside.

A background thread of the run's process writes it about once a second, and removes it at the end;
only a process that was killed leaves it. What fails is tried again a second later, and does not
disturb the run: a full disk, a look at what changes meanwhile.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfl.archive.layout import STATUS
from sfl.archive.records import by_client
from sfl.errors import IntegrityError
from sfl.files import strict_json
from sfl.files.regular_files import read_plain

EVERY_S = 1.0
MOST_BYTES = 2**24  # a hundred bytes a client
MOST_COUNT = 2**31  # of rounds and steps
MOST_S = 1e11  # that a clock may show: in the year 5138
# What a client does.
TRAINING, EVALUATING, WAITING, LOADING, AWAY = (
    "training", "evaluating", "waiting", "loading its data", "away",
)  # fmt: skip
DOINGS = (AWAY, LOADING, TRAINING, EVALUATING, WAITING)


@dataclass(frozen=True)
class Doing:
    """What a client does, its steps in the round, and why it is away."""

    what: str
    why: str = ""
    steps: int = 0
    of_steps: int = 0


@dataclass(frozen=True)
class Now:
    """What a run does: its round, from 0, or -1 before the first; its clients."""

    round: int
    clients: Mapping[int, Doing]


@dataclass(frozen=True)
class Status:
    """What the file says; times are seconds since 1970 by the clock of the run's machine."""

    now: Now
    since: Mapping[int, float]  # since when each client does what it does
    round_began_at: float
    written_at: float
    host: str
    pid: int


class LiveStatus:
    """Writes the file while a ``with`` block runs.

    ``look`` is called on a thread of its own, while the run goes on to change what it looks at.
    """

    def __init__(self, folder: Path, look: Callable[[], Now]) -> None:
        self._path, self._look = folder / STATUS, look
        self._new = folder / f"{STATUS}.tmp"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._round, self._round_began_at = -2, 0.0
        self._since: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> None:
        try:
            self._thread.start()
        except BaseException:  # an interrupt, when the thread runs already
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        for path in (self._new, self._path):
            with contextlib.suppress(OSError):
                path.unlink()

    def _work(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(Exception):  # a thread's edge; this look is left out
                # Not ``write_file``, whose crash points tests count: those of the run alone.
                self._new.write_bytes(json.dumps(asdict(self._status())).encode())
                os.replace(self._new, self._path)
            self._is_over.wait(EVERY_S)

    def _status(self) -> Status:
        now, at = self._look(), time.time()
        if now.round != self._round:
            self._round, self._round_began_at = now.round, at
        for k, doing in now.clients.items():
            if self._since.get(k, ("", 0.0))[0] != doing.what:
                self._since[k] = doing.what, at
        since = {k: self._since[k][1] for k in now.clients}
        return Status(now, since, self._round_began_at, at, platform.node(), os.getpid())


def read_status(folder: Path) -> Status | None:
    """Return what the file of a run's folder says; None if there is none.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        data = read_plain(folder / STATUS, 0, MOST_BYTES)
    except OSError:
        return None
    try:
        return _status_of(strict_json.loads(data))
    except ValueError as error:
        raise IntegrityError(f"{folder / STATUS}: is damaged: {error}") from error


def _fields(value: object, **kinds: type) -> list[Any]:
    """Return these fields of a table, each of its type."""
    if not isinstance(value, dict) or any(type(value.get(n)) is not t for n, t in kinds.items()):
        raise ValueError(f"no table of {', '.join(kinds)}")
    return [value[name] for name in kinds]


def _status_of(value: object) -> Status:
    now, since = _fields(value, now=dict, since=dict)
    began_at, written_at = map(_seconds_of, _fields(value, round_began_at=float, written_at=float))
    round_index, clients = _fields(now, round=int, clients=dict)
    if not -1 <= round_index < MOST_COUNT:
        raise ValueError("no round")
    doings, seconds = by_client(clients, _doing_of), by_client(since, _seconds_of)
    if doings.keys() != seconds.keys():
        raise ValueError("other clients in since")
    return Status(
        Now(round_index, {int(k): doing for k, doing in doings.items()}),
        {int(k): at for k, at in seconds.items()},
        began_at,
        written_at,
        *_fields(value, host=str, pid=int),
    )


def _doing_of(value: object) -> Doing:
    doing = Doing(*_fields(value, what=str, why=str, steps=int, of_steps=int))
    if doing.what not in DOINGS:
        raise ValueError(f"a client does {doing.what[:40]!r}")
    if not 0 <= doing.steps <= doing.of_steps < MOST_COUNT:
        raise ValueError("no steps")
    return doing


def _seconds_of(value: object) -> float:
    if type(value) is not float or not 0 <= value <= MOST_S:
        raise ValueError("no time")
    return value
