"""A process that does the rows of a table: one that hangs is killed, and another does the rest.

A GPU that does not answer holds whoever has asked it; only the end of a process frees it.
"""

import contextlib
import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

from sfl.errors import RunError, shortened

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "sfl"
END_S = 10.0  # for a process whose rows are done to end
_START = "from experiments.gpu_check.worker import work; work()"
_TITLE, _DONE, _OVER, _FAILED = "title", "done", "over", "failed"  # what the process says
Seen = tuple[str, bool]  # what was seen, and whether it is as it should be


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    run: Callable[[], Seen]


class Result(NamedTuple):
    """What a row has given."""

    seen: str
    is_right: bool
    seconds: float


class Worker:
    """Does rows, one by one.

    ``rows``: the function that yields them, as ``package.module:function``. It is called with the
    ``arguments`` in a process of its own, which alone imports it; after a hung row, in another.
    """

    def __init__(self, rows: str, *arguments: str) -> None:
        self._rows, self._arguments, self._num_begun = rows, arguments, 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def next_title(self, limit_s: float) -> str | None:
        """Go on to the next row, and return its title; None if there is none.

        Raises:
            RunError: the rows end here, as without a GPU, or none begins in so many seconds.
        """
        if self._process is None:
            self._start()
        said, what = self._receive(limit_s)
        if said == _FAILED:
            raise RunError(what)
        if said == _TITLE:
            self._num_begun += 1
            return what
        self._wait()
        return None

    def do(self, limit_s: float) -> Result:
        """Do the row; kill the process and all that it has started when it takes longer."""
        self._ours.send(True)
        began_at = time.monotonic()
        said, what = self._receive(limit_s)
        if said == _FAILED:
            self._kill()
            return Result(what, is_right=False, seconds=time.monotonic() - began_at)
        return Result(*what)

    @property
    def has_ended(self) -> bool:
        """Whether the next row needs another process."""
        return self._process is None

    def leave_out(self) -> None:
        self._ours.send(False)

    def _start(self) -> None:
        self._ours, theirs = Pipe()
        with theirs:
            own = [theirs.fileno(), self._num_begun, self._rows, *self._arguments]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, own)],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # with what it starts, it is killed as a group
            )

    def _receive(self, limit_s: float) -> tuple[str, Any]:
        assert self._process is not None
        if not self._ours.poll(limit_s):
            return _FAILED, f"not over after {limit_s:.0f} s, and killed"
        try:
            return self._ours.recv()
        except EOFError:
            self._wait()
            return _FAILED, f"its process ended with exit code {self._process.returncode}"

    def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._wait()
        self._ours.close()
        self._process = None

    def _wait(self) -> None:
        """Wait for the process to end; a driver that does not answer may hold it for good."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)


def work() -> None:
    """Do rows as ``Worker`` asks for them: the process that it starts."""
    pipe, first, rows, *arguments = Connection(int(sys.argv[1])), int(sys.argv[2]), *sys.argv[3:]
    with contextlib.suppress(EOFError, BrokenPipeError):  # nobody asks any more
        try:
            module, _, name = rows.partition(":")
            found: Iterable[Row] = getattr(importlib.import_module(module), name)(*arguments)
            for row in itertools.islice(found, first, None):
                pipe.send((_TITLE, row.title))
                if pipe.recv():
                    pipe.send((_DONE, tuple(_done(row))))
        except Exception as error:  # noqa: BLE001 - the process's edge
            pipe.send((_FAILED, shortened(str(error), 300)))
        else:
            pipe.send((_OVER, None))


def _done(row: Row) -> Result:
    began_at = time.monotonic()
    try:
        seen, is_right = row.run()
    except Exception as error:  # noqa: BLE001 - a row that fails is a line of the table
        seen, is_right = shortened(f"{type(error).__name__}: {error}", 300) + _place(error), False
    return Result(" ".join(seen.split()), is_right, time.monotonic() - began_at)


def _place(error: BaseException) -> str:
    """Return where in the package an error began, "" if it was elsewhere."""
    while error.__cause__:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(str(PACKAGE))]
    return f" (sfl{ours[-1].filename.removeprefix(str(PACKAGE))}:{ours[-1].lineno})" if ours else ""
