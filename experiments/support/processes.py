"""Start a server and its clients as real processes on this machine, and end them again."""

import atexit
import contextlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfl.errors import RunError

ROOT = Path(__file__).resolve().parent.parent.parent
STARTS_WITHIN_S = 60.0
PORTS = 20_000, 32_000  # below those of outgoing connections: Linux has 32768 on, macOS 49152 on
MOST_HELD = 64  # a process may have 256 files open, on some systems
LISTENING = re.compile(r"run (\S+): listening on (\S+) for")


@dataclass
class Processes:
    """A server, hops and clients that run; their output lies in ``logs``."""

    logs: Path
    start: "Callable[[str, Sequence[str]], subprocess.Popen[str]]"
    server: "subprocess.Popen[str]"
    clients: "list[subprocess.Popen[str]]" = field(default_factory=list)  # and hops
    names: list[str] = field(default_factory=list)  # of these processes
    run: str = ""
    address: str = ""

    def start_clients(
        self,
        addresses: Sequence[str],
        options: Sequence[str] = (),
        own: "Callable[[int], Sequence[str]]" = lambda client: (),
    ) -> None:
        """Start a client for each address of the server; ``own`` gives the options of each."""
        for k, address in enumerate(addresses):
            self.start_client(f"client_{k}", address, ["--client-id", str(k), *options, *own(k)])

    def start_client(self, name: str, address: str, options: Sequence[str]) -> None:
        """Start a process of one client, or of several."""
        self._start_watched(name, ["run_client.py", "--server", address, *options])

    def start_hop(self, place: int, onward: str, options: Sequence[str]) -> str:
        """Start a hop that goes on to an address; return its own, once it listens."""
        port = free_port()
        listens = ["--role", f"hop:{place}", "--port", str(port), "--next", onward]
        self._start_watched(f"hop_{place}", ["run_server.py", *listens, *options])
        until = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < until and self.clients[-1].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return f"127.0.0.1:{port}"
            time.sleep(0.05)
        raise RunError(f"hop_{place}: {last_line(self.logs / f'hop_{place}.err')}")

    def _start_watched(self, name: str, command: Sequence[str]) -> None:
        self.names.append(name)
        self.clients.append(self.start(name, command))
        threading.Thread(target=self._watch, args=[self.clients[-1]], daemon=True).start()

    def _watch(self, client: "subprocess.Popen[str]") -> None:
        """End the server, which would wait for it to come back, when a client or hop has failed."""
        if client.wait() > 0:
            self.server.kill()

    def lines(self) -> Iterator[str]:
        """Yield what the server prints, line by line, until it ends."""
        assert self.server.stdout is not None
        for line in self.server.stdout:
            yield line.rstrip("\n")

    def wait(self) -> None:
        """Wait until all have ended; when the server has failed, the clients are ended.

        Raises:
            RunError: one of them failed; the text is its last line.
        """
        failed = []
        if self.server.wait() != 0:
            self.kill()
        named = zip(("server", *self.names), (self.server, *self.clients), strict=True)
        for name, process in named:
            if process.wait() > 0:  # less: it was killed here
                failed.append(f"{name}: {last_line(self.logs / f'{name}.err')}")
        if failed:
            raise RunError("; ".join(failed))

    def kill(self) -> None:
        """End all of them at once."""
        for process in [self.server, *self.clients]:
            if process.poll() is None:
                process.kill()


def free_port(host: str = "127.0.0.1", count: int = 1) -> int:
    """Return a free port that the system gives no outgoing connection, or the first of several.

    So a server that was killed finds it free, whatever else this machine does meanwhile. Other
    processes that ask do not get it either: its number is held as one of UDP.

    Raises:
        RunError: there is none.
    """
    for port in random.SystemRandom().sample(range(*PORTS, count), 1000):  # whatever seeds others
        try:
            for number in range(port, port + count):
                _hold(host, number)
            return port
        except OSError:
            continue
    raise RunError(f"no port of {host} from {PORTS[0]} to {PORTS[1]} is free")


_held: deque[socket.socket] = deque()  # of the last ports, until this process ends


def _hold(host: str, port: int) -> None:
    _held.append(socket.socket(type=socket.SOCK_DGRAM))
    _let_go(MOST_HELD)
    _held[-1].bind((host, port))
    socket.create_server((host, port)).close()


@atexit.register
def _let_go(but: int = 0) -> None:
    while len(_held) > but:
        _held.popleft().close()


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


@contextlib.contextmanager
def running(server_options: Sequence[str]) -> Iterator[Processes]:
    """Start one server on a free port of this machine; kill what is left of it and its clients.

    Raises:
        RunError: the server did not start; the text is its last line.
    """
    with tempfile.TemporaryDirectory(prefix="sfl-") as folder, contextlib.ExitStack() as stack:
        logs = Path(folder)

        def start(name: str, command: Sequence[str]) -> "subprocess.Popen[str]":
            errors = stack.enter_context(open(logs / f"{name}.err", "w"))
            reads = name == "server"
            output = subprocess.PIPE if reads else subprocess.DEVNULL
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=errors, text=True
            )
            stack.callback(_end, process)
            return process

        server = start("server", ["run_server.py", "--port", "0", *server_options])
        processes = Processes(logs, start, server)
        for line in processes.lines():
            if found := LISTENING.match(line):
                processes.run, processes.address = found.groups()
                break
        else:
            processes.wait()
            raise RunError("the server ended before it listened")
        yield processes


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
