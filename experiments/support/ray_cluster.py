"""A Ray cluster for as long as a program needs it, and lines from its processes.

Ray places processes, watches them and starts them again; what they say to each other about a run
goes over SFL's own transports. Before it imports this module, a program puts what is in
``quiet_ray`` into its environment.
"""

import contextlib
import io
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence

import ray

from sfl.errors import RunError

LOCAL = "local"
OBJECT_STORE_BYTES = 100 * 2**20  # no tensor goes through it; by default it takes a third of memory


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be part of a Ray cluster; what was started in it ends with the block.

    Raises:
        RunError: there is none, or it cannot be joined.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address == LOCAL:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else a file of the home
            folder = tempfile.TemporaryDirectory(  # short: names of sockets lie in it
                prefix="ray", dir="/tmp", ignore_cleanup_errors=True
            )
            quiet |= {
                "_temp_dir": stack.enter_context(folder),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        stack.callback(ray.shutdown)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise RunError(
                f"--address {address}: cannot join a Ray cluster: {why} Start one by ray start"
                " --head, or give --address local"
            ) from error
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
        yield


class _Kept:
    """An actor that keeps lines until the program takes them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, text: str) -> None:
        self._lines.append(text)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


class Lines:
    """Lines of text from processes of a cluster to the program; travels to them."""

    def __init__(self) -> None:
        again = {"max_restarts": -1, "max_task_retries": -1}  # without what it had kept
        self._kept = ray.remote(_Kept).options(num_cpus=0, **again).remote()

    def put(self, text: str) -> ray.ObjectRef:
        """Send a line; it does not wait."""
        return self._kept.put.remote(text)

    def get(self) -> list[str]:
        """Return what has come since the last call."""
        lines: list[str] = ray.get(self._kept.take.remote())
        return lines

    @contextlib.contextmanager
    def taken_from_stdout(self) -> Iterator[None]:
        """Send what this process prints; at the end all has arrived."""
        stream = _LineStream(self)
        try:
            with contextlib.redirect_stdout(stream):
                yield
        finally:
            ray.get(stream.last)


class _LineStream(io.TextIOBase):
    """A standard output whose lines go to the program."""

    def __init__(self, lines: Lines) -> None:
        self._lines, self._begun = lines, ""
        self.last: list[ray.ObjectRef] = []  # what was sent last: it arrives in order

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            self.last = [self._lines.put(line)]
        return len(text)


def take_command_line(argv: Sequence[str]) -> None:
    """Let this process be known by the program's command line: runs record it."""
    sys.argv[:] = argv
