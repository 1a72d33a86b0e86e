"""The folder of a run, on server or client: its event log and the archive in it."""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sfl.archive.checkpoint import lying
from sfl.archive.writer import ArchiveWriter
from sfl.errors import ConfigError, RunError, reason_of
from sfl.files.regular_files import which_file
from sfl.values import KeepModels
from sfl.wire.link import one_line
from sfl.wire.messages import MessageType

MAX_LINE = 10_000  # characters of a log


def new_run_name() -> str:
    """Return the name of a run that the user did not name: the time it started.

    To the microsecond, since clients put runs of different servers side by side.
    """
    now = datetime.datetime.now()
    return now.strftime("%Y-%m-%d_%H-%M-%S.%f")


def create_run_folder(parent: Path, name: str) -> Path:
    """Create the folder of a new run; without a name, under the start time.

    One of that name in which no step was taken, as of a start that failed, is taken over.

    Raises:
        ConfigError: a run of this name exists.
        RunError: the folder cannot be written.
    """
    path = parent / (name or new_run_name())
    if not make_folder(path, SERVER_LOG):
        raise ConfigError(
            f"a run {path.name} exists in {parent}; give another --run, or go on with it by"
            f" --resume {path}"
        )
    return path


WATCHED = ("models", "client_files", "checkpoints", "rounds")  # beside the folder and its log
SERVER_LOG, CLIENT_LOG = "server_log.txt", "client_log.txt"
FIRST_STEP = "training begins: the first step is taken"  # in either
# What lies in a run's folder, on server or client, before the first step is taken.
_BEFORE_STEPS = re.compile(
    r"(server|client)_log\.txt|(config|environment)\.json|manifest\.jsonl|(rounds|profile)\.csv"
    r"|models/\w+_init\.pt|checkpoints/round_000\.json|downloads/.*"
)


def make_folder(path: Path, log_name: str) -> bool:
    """Create a run's folder, or take over one in which no step was taken; its log is kept.

    Return whether it can be written into: else a run lies in it, or another process has it.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        if not path.exists():
            path.mkdir(parents=True)
            return True
        if path.is_symlink() or not path.is_dir() or not has_no_steps(path):
            return False
        try:
            log = EventLog(path / log_name)
        except RunError:  # another process has it
            return False
        with log:
            for inside in path.iterdir():
                if inside.is_dir():
                    shutil.rmtree(inside)
                elif inside.name != log_name:
                    inside.unlink()
            log.say(f"{path} is taken over: no step was taken in it")
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}; see --out") from error
    return True


def has_no_steps(path: Path) -> bool:
    """Say whether nothing lies in a run's folder but what lies there before its first step.

    Where no tensors are kept, the log alone tells that steps were taken.
    """
    for log in (path / SERVER_LOG, path / CLIENT_LOG):
        if log.exists() and FIRST_STEP.encode() in log.read_bytes():
            return False
    for folder, folders, files in os.walk(path):
        inside = Path(folder)
        names = ((inside / name).relative_to(path).as_posix() for name in files)
        if not all(map(_BEFORE_STEPS.fullmatch, names)):
            return False
        if any((inside / name).is_symlink() for name in (*folders, *files)):
            return False
    tables = (path / "rounds.csv", path / "profile.csv")
    return all(t.read_bytes().count(b"\n") <= 1 for t in tables if t.exists())


def to_json(values: Mapping[str, Any]) -> bytes:
    """Return a record as it lies on disk."""
    return (json.dumps(values, indent=2) + "\n").encode()


def options_record(*configs: Any) -> dict[str, Any]:
    """Return every option of these configurations, flat, as ``--config`` reads them."""
    return {n: v for config in configs for n, v in dataclasses.asdict(config).items()}


class EventLog:
    """Lines for people: on the terminal, and with the time in a file. Closed by ``with``."""

    def __init__(self, path: Path) -> None:
        """Raises ``RunError`` if another process writes it: a run has one writer at a time."""
        self.is_quiet = False  # whether nothing goes to the terminal
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - see close
        if importlib.util.find_spec("fcntl"):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except OSError as error:
                self._file.close()
                raise RunError(f"another process is writing {path.parent}") from error

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self._file.close()

    def say(self, line: str) -> None:
        """Write one line to both."""
        self.note(line)
        if not self.is_quiet:
            say(one_line(line, MAX_LINE))

    def note(self, line: str) -> None:
        """Write one line to the file alone."""
        line = one_line(line, MAX_LINE)
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def is_being_written(log: Path) -> bool:
    """Say whether a process is writing the run of this log."""
    try:
        with EventLog(log):
            return False
    except RunError:
        return True
    except FileNotFoundError:
        return False


def say(line: str) -> None:
    """Write one line to the terminal, above a progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()  # who reads through a pipe sees it now


@dataclass(frozen=True)
class RunFolder:
    """What a run writes into."""

    path: Path
    archive: ArchiveWriter
    events: EventLog
    known: dict[Path, object]  # what a run cannot do without, and which file each was

    def gone(self) -> str:
        """Say what has been removed or renamed since the folder was opened; "" if nothing was.

        A file that is open takes what is written, whether somebody can still find it or not.
        """
        for name in WATCHED:  # which are made while the run goes on
            if (which := which_file(self.path / name)) is not None:
                self.known.setdefault(self.path / name, which)
        missing = [path for path, which in self.known.items() if which != which_file(path)]
        if not missing:
            return ""
        return f"{missing[0]} is gone: it was removed or renamed while the run went on"

    def check_there(self) -> None:
        """See that what is written can still be found.

        Raises:
            RunError: it cannot.
        """
        if why := self.gone():
            raise RunError(why)


@contextlib.contextmanager
def open_folder(path: Path, log_name: str, keep: KeepModels) -> Iterator[RunFolder]:
    """Open the log and the archive of a folder that exists; both are closed at the end."""
    with EventLog(path / log_name) as events, ArchiveWriter(path, keep.tensors, keep) as archive:
        known: dict[Path, object] = {p: which_file(p) for p in (path, path / log_name)}
        yield RunFolder(path, archive, events, known)


@contextlib.contextmanager
def telling_why(
    folder: RunFolder,
    tell: Callable[[str, MessageType], None] | None = None,
    how_to_go_on: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """When a party fails, write why into its log, tell its peers, and say how to go on.

    Raises:
        RunError: instead of what the party failed with, if its folder is gone.
    """
    events = folder.events
    try:
        yield
    except BaseException as error:
        gone = folder.gone()
        reason = gone or reason_of(error)
        if tell is not None:
            tell(reason, MessageType.END_RUN if gone else MessageType.ABORT)
        with contextlib.suppress(OSError):  # a full disk is no reason to lose the reason
            events.note(f"the run failed: {reason}")
        if hint := how_to_go_on():
            with contextlib.suppress(OSError):
                events.note(hint)
            say(hint)
        if gone and isinstance(error, Exception):
            raise RunError(gone) from error
        raise


def how_to_go_on(path: Path, model: str) -> Callable[[], str]:
    """Return what says how to go on with a run, if it has begun."""
    allow = f" --allow-import {model}" if ":" in model else ""

    def hint() -> str:
        return f"go on with: run_server.py --resume {path}{allow}" if lying(path) else ""

    return hint
