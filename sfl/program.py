"""The edge of every program: exit codes, errors in one line, signals, standard streams.

Exit codes: 0 done; 1 the run failed; 2 bad options; 3 stopped by Ctrl-C or SIGTERM, the run can be
resumed. An error is one line on standard error; ``SFL_TRACEBACK=1`` adds the traceback.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from sfl.errors import ConfigError, not_installed, reason_of
from sfl.wire.link import one_line

INTERRUPTED = 3  # exit code


def run_program(name: str, program: Callable[[], int | None]) -> int:
    """Run a program and return its exit code, with one line on standard error if it fails.

    SIGTERM acts like Ctrl-C: peers are told, and pending files are written. A second signal ends
    the process at once. ``program`` imports its modules itself, so that an interrupt while torch is
    imported shows no traceback.
    """
    _open_streams()
    with _interruptible(name):
        try:
            return program() or 0
        except ConfigError as error:
            return _fail(name, error, 2)
        except KeyboardInterrupt as error:
            return _fail(name, error, INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            is_ours = package in ("", "sfl", "experiments")
            return _fail(name, error if is_ours else not_installed(package), 1)
        except Exception as error:  # noqa: BLE001 - the process's edge
            return _fail(name, error, 1)


@contextlib.contextmanager
def _interruptible(name: str) -> Iterator[None]:
    """Raise KeyboardInterrupt at a signal; at the end the outcome is decided: ignore later ones."""
    is_interrupted = False

    def interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        nonlocal is_interrupted
        if is_interrupted:
            os.write(2, f"{name}: error: interrupted twice\n".encode())
            os._exit(INTERRUPTED)
        is_interrupted = True
        raise KeyboardInterrupt

    def lost(what: "sys.UnraisableHookArgs") -> None:
        """An interrupt in a destructor goes no further: interrupt again, outside of it."""
        nonlocal is_interrupted
        if what.exc_type is not KeyboardInterrupt:
            hook(what)
            return
        is_interrupted = False
        threading.Timer(0.05, os.kill, (os.getpid(), caught[-1])).start()

    # A program that a shell starts in the background ignores Ctrl-C: keep that.
    numbers = (signal.SIGINT, signal.SIGTERM)
    caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_IGN)
        sys.unraisablehook = hook


class _Lenient(io.FileIO):
    """A standard stream that discards output after its reader has closed the pipe."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # no reader or no terminal
                raise
            return len(data)


def _open_streams() -> None:
    """Make a program work without standard input, output or error, as some services start it.

    Otherwise a file could be opened under a closed stream's number, and get libraries' output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
        elif mode == "w" and stream is getattr(sys, f"__{name}__") and _is_plain(stream, number):
            setattr(sys, name, _lenient(stream, number))


def _is_plain(stream: Any, number: int) -> bool:
    """Return whether a stream is Python's own for a descriptor, not one replaced by us."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer
    return type(raw) is io.FileIO and raw.fileno() == number


def _lenient(stream: Any, number: int) -> io.TextIOWrapper:
    """Return a stream for a descriptor that discards output after its reader has gone."""
    stream.flush()
    raw, unbuffered = _Lenient(number, "w", closefd=False), isinstance(stream.buffer, io.FileIO)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _fail(name: str, error: BaseException, code: int) -> int:
    if os.environ.get("SFL_TRACEBACK"):
        traceback.print_exception(error)
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else reason_of(error)
    sys.stderr.write(f"{name}: error: {one_line(reason, 2000)}\n")
    return code
