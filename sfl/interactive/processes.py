"""A server or clients as processes of their own, started from a Python session.

::

    server = sfl.serve(sfl.RunConfig(clients=2, rounds=3), port=0)
    clients = [sfl.join(server.address()) for _ in range(2)]
    run = server.run(timeout=600)     # waits for its end
"""

import atexit
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sfl
from sfl.config import RunConfig, flag
from sfl.errors import RunError
from sfl.nodes import ClientNode, ServerNode
from sfl.options import from_values

POLL_S = 0.05  # how often a file of output is read while something is waited for
_LISTENING = re.compile(r"listening on (\S+?:\d+) ")
_FOLDER = re.compile(r"the run lies in (.+)\n")
_START = "import sys; from sfl.cli import {main}; sys.exit({main}())"


class Process:
    """A program of its own; nothing here waits longer than it is told to.

    It is stopped when the Python session ends, and is not interrupted when a notebook's cell is.
    """

    def __init__(self, main: str, name: str, options: Sequence[str]) -> None:
        """``main``: of ``sfl.cli``; ``name``: in messages."""
        self._name = name
        self._file = tempfile.NamedTemporaryFile(prefix="sfl-")  # noqa: SIM115 - lives as we do
        packages = [str(Path(sfl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(main=main), *options],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, packages))},
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C and a notebook's interrupt go to the session alone
        )
        atexit.register(self.stop)

    def __repr__(self) -> str:
        code = self._process.poll()
        state = "running" if code is None else f"ended with {code}"
        return f"<{self._name}, process {self._process.pid}: {state}>"

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        """What it has written so far."""
        return Path(self._file.name).read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float) -> None:
        """Wait for its end, for at most so many seconds.

        Raises:
            RunError: it has failed, or is still running.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self.is_running:
            raise RunError(f"{self._name} is still running after {timeout:g} s; see its output")
        if code := self._process.returncode:
            raise RunError(f"{self._name} ended with exit code {code}: {self._last_line()}")

    def stop(self, timeout: float = 10) -> None:
        """End it as Ctrl-C does, so that it tells its peers; after the timeout, by force."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        if self.is_running:
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.stop)

    def _last_line(self) -> str:
        return (self.output.strip().splitlines() or ["it has written nothing"])[-1]

    def _find(self, pattern: re.Pattern[str], what: str, goes_on: Callable[[], bool]) -> str:
        """Return what its output says of something, as long as it may still come."""
        while True:
            may_come = self.is_running and goes_on()
            if found := pattern.search(self.output):
                return found[1]
            if not may_come:
                raise RunError(f"{self._name} has not said {what}: {self._last_line()}")
            time.sleep(POLL_S)


class Server(Process):
    """A server's process."""

    def address(self, timeout: float = 60) -> str:
        """Return the HOST:PORT that it listens on, as soon as it does.

        Raises:
            RunError: it has failed, or does not listen by then.
        """
        until = time.monotonic() + timeout
        where = "where it listens"
        return self._find(_LISTENING, where, lambda: time.monotonic() < until)

    def run(self, timeout: float, **machine: Any) -> Any:
        """Wait for the run's end, and open it; ``machine``: as for ``sfl.open_run``.

        Raises:
            RunError: it has failed, or is still running.
        """
        self.wait(timeout)
        folder = self._find(_FOLDER, "where the run lies", lambda: False)
        return sfl.open_run(folder, **machine)


def serve(config: RunConfig, **machine: Any) -> Server:
    """Start the server of a run, as ``run_server.py`` does, and return at once.

    ``machine``: its other options as keywords: ``host``, ``port``, ``token_file``, ``out``, ...

    Raises:
        ConfigError: an option is out of range.
    """
    node = from_values(ServerNode, machine, "the options of this machine")
    config.check()
    return Server("main_server", "the server", [*_options(config), *_options(node)])


def join(server: str, **machine: Any) -> Process:
    """Start a client of a run, as ``run_client.py`` does, and return at once.

    ``server``: HOST:PORT. ``machine``: its other options as keywords: ``client_id``, ``client_ids``
    for several in one process, ``token_file``, ``data_dir``, ...

    Raises:
        ConfigError: an option is out of range.
    """
    node = from_values(ClientNode, machine | {"server": server}, "the options of this machine")
    return Process("main_client", f"the client of {server}", _options(node))


def _options(config: Any) -> list[str]:
    """Return the command line of a config: what differs from its defaults."""
    values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    return [
        flag(name) if value is True else f"{flag(name)}={value}"
        for name, (value, default) in values.items()
        if value != default
    ]
