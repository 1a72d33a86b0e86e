"""The folder of a run, on server or client: its event log and the archive in it."""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sfl.archive_writer import ArchiveWriter
from sfl.checkpoint import lying
from sfl.config import KeepModels
from sfl.errors import ConfigError, RunError, reason_of
from sfl.link import one_line
from sfl.plain_file import which_file
from sfl.protocol import MessageType

MAX_LINE = 10_000  # characters of a log


def new_run_name() -> str:
    """Return the name of a run that the user did not name: the time it started.

    To the microsecond, since clients put runs of different servers side by side.
    """
    now = datetime.datetime.now()
    return now.strftime("%Y-%m-%d_%H-%M-%S.%f")


def create_run_folder(parent: Path, name: str) -> Path:
    """Create the folder of a new run; without a name, under the start time.

    Raises:
        ConfigError: a run of this name exists.
        RunError: the folder cannot be written.
    """
    path = parent / (name or new_run_name())
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"a run {path.name} exists in {parent}; give another --run") from None
    except OSError as error:
        raise RunError(f"cannot write to {parent}: {error.strerror}; see --out") from error
    return path


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
    known: Mapping[Path, object]  # what a run cannot do without, and which file each was

    def gone(self) -> str:
        """Say what has been removed or renamed since the folder was opened; "" if nothing was.

        A file that is open takes what is written, whether somebody can still find it or not.
        """
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
        known = {place: which_file(place) for place in (path, path / log_name)}
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
