"""The folder of a run, on server or client: creating it, its event log and its archive."""

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

from sfl.archive.checkpoint import checkpoint_paths
from sfl.archive.writer import ArchiveWriter
from sfl.errors import ConfigError, RunError, command, reason_of
from sfl.files.regular_files import which_file
from sfl.values import KeepModels
from sfl.wire.link import one_line
from sfl.wire.messages import MessageType

MAX_LINE = 10_000  # characters of a log


def new_run_name() -> str:
    """Return the default name of a run: the time, in microseconds.

    Microseconds keep runs of different servers apart in one client's folder.
    """
    now = datetime.datetime.now()
    return now.strftime("%Y-%m-%d_%H-%M-%S.%f")


def create_run_folder(parent: Path, name: str) -> Path:
    """Create the folder of a new run; without a name, it is the start time.

    An existing folder without a training step, left by a failed start, is reused.

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


WATCHED = ("models", "client_files", "checkpoints", "rounds")  # besides the folder and its log
SERVER_LOG, CLIENT_LOG = "server_log.txt", "client_log.txt"
FIRST_STEP = "training begins: the first step is taken"  # line of either log
# How the lines begin with which the server's log ends; after a failure, GO_ON may follow.
RUN_OVER, RUN_FAILED, GO_ON = "the run lies in ", "the run failed: ", "go on with: "
RUN_STOPS = "the run stops after round "  # before that, if it ends early
# Files that a run's folder, on server or client, may contain before the first step; any of them may
# be half written.
_BEFORE_STEPS = re.compile(
    r"(rank_\d+/)?((server|client)_log\.txt|(config|environment)\.json|status\.json|manifest\.jsonl|(rounds|profile)\.csv"
    r"|models/\w+_init\.pt|checkpoints/round_000\.json|downloads/.*)(\.tmp)?"
)


def make_folder(path: Path, log_name: str) -> bool:
    """Create a run's folder, or reuse one without a training step, keeping its log.

    Return whether that succeeded; if not, the folder has a run or another process uses it.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return True
        if path.is_symlink() or not path.is_dir() or not has_no_steps(path):
            return False
        try:
            log = EventLog(path / log_name)
        except RunError:  # another process uses it
            return False
        with log:
            if not has_no_steps(path):  # it has taken one since
                return False
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
    """Return whether a run's folder has only files from before its first step.

    Where no tensors are kept, only the log shows that steps were taken.
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
    """Return a record as the bytes of its file."""
    return (json.dumps(values, indent=2) + "\n").encode()


def options_record(*configs: Any) -> dict[str, Any]:
    """Return all options of these configurations in one table, as ``--config`` reads them."""
    return {n: v for config in configs for n, v in dataclasses.asdict(config).items()}


class EventLog:
    """Lines for the user: on the terminal, and with the time in a file. Closed by ``with``.

    Raises:
        RunError: another process is writing it; a run has one writer at a time.
    """

    def __init__(self, path: Path) -> None:
        self.is_quiet = False  # whether lines go to the file alone
        self.prefix = ""  # of lines on the terminal: whose they are, if another speaks for the run
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - see close
        if importlib.util.find_spec("fcntl"):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by closing
            except OSError as error:
                self._file.close()
                raise RunError(f"another process is writing {path.parent}") from error

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # unwritten lines on a full disk
            self._file.close()

    def say(self, line: str) -> None:
        """Write one line to terminal and file."""
        self.note(line)
        if not self.is_quiet:
            say(one_line(f"{self.prefix}{line}", MAX_LINE))

    def say_of_run(self, line: str) -> None:
        """Write one line about the whole run; of several processes, one tells the terminal."""
        (self.note if self.prefix else self.say)(line)

    def note(self, line: str) -> None:
        """Write one line to the file alone."""
        line = one_line(line, MAX_LINE)
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def is_being_written(log: Path) -> bool:
    """Return whether a process is writing the run of this log."""
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
    sys.stdout.flush()  # for readers of a pipe


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, open for writing."""

    path: Path
    archive: ArchiveWriter
    events: EventLog
    identities: dict[Path, object]  # watched paths -> identity of the file when first seen

    def why_missing(self) -> str:
        """Return a message if a watched path was removed or renamed since it was opened, else "".

        Writing to an open file succeeds even after its removal.
        """
        for name in WATCHED:  # created during the run
            if (which := which_file(self.path / name)) is not None:
                self.identities.setdefault(self.path / name, which)
        missing = [path for path, which in self.identities.items() if which != which_file(path)]
        if not missing:
            return ""
        return f"{missing[0]} is gone: it was removed or renamed while the run went on"

    def check_exists(self) -> None:
        """Check that the folder and its watched paths are still in place.

        Raises:
            RunError: one was removed or renamed.
        """
        if why := self.why_missing():
            raise RunError(why)


@contextlib.contextmanager
def open_folder(path: Path, log_name: str, keep: KeepModels) -> Iterator[RunFolder]:
    """Open the log and the archive of an existing folder; both are closed at the end."""
    with EventLog(path / log_name) as events, ArchiveWriter(path, keep.tensors, keep) as archive:
        identities: dict[Path, object] = {p: which_file(p) for p in (path, path / log_name)}
        yield RunFolder(path, archive, events, identities)


@contextlib.contextmanager
def reporting_failure(
    folder: RunFolder,
    tell: Callable[[str, MessageType], None] | None = None,
    resume_hint: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """On an error, log it, ``tell`` the peers, and show how to resume; then raise it again.

    Raises:
        RunError: instead of the error, if the run's folder was removed.
    """
    events = folder.events
    try:
        yield
    except BaseException as error:
        gone = folder.why_missing()
        reason = gone or reason_of(error)
        if tell is not None:
            tell(reason, MessageType.END_RUN if gone else MessageType.ABORT)
        with contextlib.suppress(OSError):  # on a full disk, still raise the error itself
            events.note(f"{RUN_FAILED}{reason}")
        if hint := resume_hint():
            with contextlib.suppress(OSError):
                events.note(hint)
            if not events.is_quiet and not events.prefix:
                say(hint)
        if gone and isinstance(error, Exception):
            raise RunError(gone) from error
        raise


def resume_hint(path: Path, model: str, server: str = "") -> Callable[[], str]:
    """Return a function that gives the command for resuming a run; "" without a checkpoint.

    ``server``: how it is started; else as in one process.
    """
    allow = f" --allow-import {model}" if ":" in model else ""

    def hint() -> str:
        resume = f"{server or command('server')} --resume {path}{allow}"
        return f"{GO_ON}{resume}" if checkpoint_paths(path) else ""

    return hint
