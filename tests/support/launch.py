"""Run servers and clients as processes of their own, on real ports.

A fork server that has imported torch starts them at once. Tests of command lines and exit codes go
through the same ``main`` functions as the programs.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from experiments.support.processes import free_port
from experiments.web.__main__ import main as serve_web
from sfl.cli import main_client, main_predict, main_server, main_watch
from sfl.program import run_program
from tests.support.certificates import Certificates

_CONTEXT = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo when the first optimiser is made: a second for each process.
_CONTEXT.set_forkserver_preload(
    [
        "sfl.runtime.server",
        "sfl.runtime.fed_server",
        "sfl.runtime.client",
        "sfl.data.private_data",
        "tests.support.digits",
        "torch._dynamo",
    ]
)
TIMEOUT_S = 120
SCHEMES = {"tcp": "", "ws": "ws://", "wss": "wss://"}  # of addresses, by transport
# No test reaches out: a download ends at a proxy that is not there.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
OFFLINE["no_proxy"] = "127.0.0.1"


def in_turns(values: Iterable[object]) -> list[tuple[object, ...]]:
    """Return each value, or tuple of values, behind the next transport: tcp, ws, wss, tcp, ..."""
    rows = (value if isinstance(value, tuple) else (value,) for value in values)
    return [(transport, *row) for transport, row in zip(cycle(SCHEMES), rows, strict=False)]


def main_web(argv: list[str]) -> int:
    return run_program("web", lambda: serve_web(argv))


def _child(
    main: Callable[[list[str]], int], argv: list[str], log: Path, env: Mapping[str, str]
) -> None:
    os.environ.update(OFFLINE | dict(env))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # who tests in the background ignores it
    for stream, suffix in ((1, "out"), (2, "err")):
        target = os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, stream)
    sys.stdin.close()
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Program:
    """One process; its output lies in ``<log>.out`` and ``<log>.err``."""

    process: ForkServerProcess
    log: Path

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()

    def wait(self) -> int:
        """Return the exit code."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, f"{self.log.name} still runs:\n{self.out}"
        return self.process.exitcode

    def ended_with(self, code: int) -> str:
        """Wait, check the exit code and that errors are one line, and return that line."""
        assert self.wait() == code, self.err + self.out
        lines = self.err.splitlines()
        assert len(lines) == (1 if code else 0), self.err
        assert "Traceback" not in self.out
        return "".join(lines)


@dataclass
class Launcher:
    """Starts programs in one folder, and kills those that are left."""

    folder: Path
    # The first of several: a server's ranks on one machine listen on the next ones.
    port: int = field(default_factory=lambda: free_port(count=4))
    programs: list[Program] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    transport: str = "tcp"  # of SCHEMES

    def at(self, address: str) -> list[object]:
        """Return a client's options that lead it to HOST:PORT over the transport."""
        trust = ["--tls-ca", self._certificates.trust] if self.transport == "wss" else []
        return ["--server", f"{SCHEMES[self.transport]}{address}", *trust]

    @cached_property
    def _certificates(self) -> Certificates:
        return Certificates(self.folder)

    @cached_property
    def _of_server(self) -> list[object]:
        own = self._certificates.issue("server") if self.transport == "wss" else []
        return [*(["--transport", "ws"] if self.transport != "tcp" else []), *own]

    def start(
        self,
        name: str,
        main: Callable[[list[str]], int],
        argv: Sequence[object],
        env: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a program by its main function."""
        log = self.folder / f"{name}-{len(self.programs)}"
        Path(f"{log}.out").touch()
        arguments = (main, [str(a) for a in argv], log, self.env | dict(env or {}))
        process = _CONTEXT.Process(target=_child, args=arguments)
        process.start()
        self.programs.append(Program(process, log))
        return self.programs[-1]

    def server(self, *options: object, env: Mapping[str, str] | None = None) -> Program:
        argv = ["--port", self.port, "--out", self.folder, *self._of_server, *options]
        return self.start("server", main_server, argv, env)

    def fed(self, *options: object, env: Mapping[str, str] | None = None) -> Program:
        argv = ["--role", "fed", "--out", self.folder, *self._of_server, *options]
        return self.start("fed", main_server, argv, env)

    def hop(
        self, place: int, port: int, to: int, *options: object, env: Mapping[str, str] | None = None
    ) -> Program:
        """Start a hop that listens on ``port`` and goes on to ``to``."""
        return self.follower(f"hop:{place}", port, to, *options, env=env)

    def follower(
        self, role: str, port: int, to: int, *options: object, env: Mapping[str, str] | None = None
    ) -> Program:
        """Start a party that follows the main server, with this role."""
        onward = [f"{SCHEMES[self.transport]}127.0.0.1:{to}", *self.at("")[2:]]
        argv = ["--role", role, "--port", port, "--out", self.folder, *self._of_server]
        argv += ["--next", *onward, *options]
        return self.start(role.replace(":", "_"), main_server, argv, env)

    def client(self, *options: object, env: Mapping[str, str] | None = None) -> Program:
        argv = [*self.at(f"127.0.0.1:{self.port}"), "--out", self.folder, *options]
        return self.start("client", main_client, argv, env)

    def watch(self, *options: object) -> str:
        """Return one picture of a run of this folder, 80 columns wide."""
        env = {"COLUMNS": "80"}
        program = self.start("watch", main_watch, ["--out", self.folder, *options], env)
        program.ended_with(0)
        return program.out

    def predict(self, *options: object) -> Program:
        argv = [*self.at(f"127.0.0.1:{self.port}"), *options]
        return self.start("predict", main_predict, argv)

    def web(self, *options: object) -> Program:
        argv = ["--port", self.port, "--out", self.folder, "--no-decoder", *options]
        return self.start("web", main_web, argv)

    def run(
        self, *options: object, clients: int = 3, client_options: Sequence[object] = ()
    ) -> Path:
        """Run a whole configuration to its end and return the server's folder of it."""
        server = self.server("--clients", clients, "--run", "r", *options)
        own = [self.client("--client-id", k, *client_options) for k in range(clients)]
        for program in [server, *own]:
            program.ended_with(0)
        return self.folder / "server" / "r"

    def end(self) -> None:
        for program in self.programs:
            program.process.kill()
            program.process.join()


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Launcher]:
    """Give a launcher, and end what it has started."""
    launcher = Launcher(folder)
    try:
        yield launcher
    finally:
        launcher.end()


def wait_for(program: Program, text: str) -> None:
    """Wait until a program has printed something."""
    until = time.monotonic() + TIMEOUT_S
    while text not in program.out:
        assert time.monotonic() < until, f"no {text!r}:\n{program.out}{program.err}"
        program.process.join(0.02)
        assert program.process.is_alive(), f"ended without {text!r}:\n{program.out}{program.err}"


def send_signal(program: Program, number: int) -> None:
    assert program.process.pid is not None
    os.kill(program.process.pid, number)


def options_of(run: dict[str, object]) -> list[object]:
    return [text for name, value in run.items() for text in (f"--{name.replace('_', '-')}", value)]


def was_killed(program: Program) -> None:
    program.process.join(60)
    assert program.process.exitcode == -signal.SIGKILL, program.out + program.err


def finish(programs: list[Program]) -> None:
    for program in programs:
        program.ended_with(0)
