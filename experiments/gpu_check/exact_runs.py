"""One configuration as server and clients, in one process, and while its processes are killed."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.chaos.small_model import CUT, NAME
from experiments.support.processes import Processes, running
from sfl.config import RunConfig
from sfl.errors import RunError
from sfl.nodes import SimulationNode
from sfl.options import parse_options
from sfl.runtime.simulation import simulate

NUM_CLIENTS = 2
LIMIT_S = 90.0  # of one run; a GPU takes seconds to start in each process
_RUN = (
    "--model", NAME, "--cut", str(CUT), "--dataset", "mnist-5k", "--partition", "own",
    "--clients", str(NUM_CLIENTS), "--batch-size", "20", "--run", "r",
)  # fmt: skip
# Killed after these lines of the server: a client, then the server.
KILL_CLIENT, KILL_SERVER, KILLED_ROUNDS = "round 2/", "round 4/", 8


@dataclass(frozen=True)
class Place:
    """Which devices compute, as in ``--device``."""

    title: str
    server: str
    clients: str


@dataclass(frozen=True)
class Case:
    """What is trained, and where. ``data`` has a folder ``client_k`` for each client."""

    title: str
    options: Sequence[str]  # of the run; the model has BatchNorm and dropout on both sides
    place: Place
    data: Path
    rounds: int = 3

    def __str__(self) -> str:
        return f"{self.title}; {self.place.title}"

    @property
    def run_options(self) -> list[str]:
        return [*_RUN, "--rounds", str(self.rounds), *self.options]


def in_one_process(case: Case, out: Path) -> Path:
    """Simulate a case on the same devices in this process; return the run's folder."""
    node = ["--device", case.place.server, "--client-device", case.place.clients]
    node += ["--data-dir", str(case.data), "--out", str(out)]
    options = [*case.run_options, *node]
    run, own = parse_options(options, RunConfig, SimulationNode, prog="gpu_check", about="")
    with contextlib.redirect_stdout(io.StringIO()):
        return simulate(run, own)


def over_sockets(case: Case, out: Path) -> Path:
    """Run a server and the clients as two processes; return the server's folder.

    Raises:
        RunError: one of them failed.
    """
    with _started(case, out) as processes:
        both = ["--client-ids", f"0-{NUM_CLIENTS - 1}", *_client_options(case, out)]
        processes.start_client("clients", processes.address, [*both, "--data-dir", str(case.data)])
        for _ in processes.lines():
            pass
        processes.wait()
    return out / "server" / "r"


def killed(case: Case, out: Path) -> Path:
    """Run each client as a process; kill one and the server, and start them again.

    Raises:
        RunError: one of them failed, or the run was over too early.
    """
    with _started(case, out) as processes:
        for k in range(NUM_CLIENTS):
            processes.start_client(f"client_{k}", processes.address, _one_client(case, out, k))
        _wait_for(processes, KILL_CLIENT)
        processes.clients[0].kill()
        processes.clients[0].wait()
        processes.start_client("client_0_again", processes.address, _one_client(case, out, 0))
        _wait_for(processes, KILL_SERVER)
        processes.server.kill()
        if processes.server.wait() == 0:
            raise RunError("the run was over before its server could be killed")
        port = processes.address.rpartition(":")[2]
        resume = ["--port", port, "--resume", str(out / "server" / "r")]
        own = ["--out", str(out), "--device", case.place.server]
        processes.server = processes.start("resumed", ["run_server.py", *resume, *own])
        processes.wait()
    return out / "server" / "r"


@contextlib.contextmanager
def _started(case: Case, out: Path) -> Iterator[Processes]:
    """Start a server; it and its clients are killed when they take too long.

    Raises:
        RunError: they took too long.
    """
    device = ["--device", case.place.server]
    with running([*case.run_options, "--out", str(out), *device]) as processes:
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            processes.kill()

        timer = threading.Timer(LIMIT_S, give_up)
        timer.start()
        try:
            yield processes
        finally:
            timer.cancel()
        if is_late.is_set():
            raise RunError(f"the run was not over after {LIMIT_S:.0f} s")


def _client_options(case: Case, out: Path) -> list[str]:
    return ["--allow-import", NAME, "--out", str(out), "--device", case.place.clients]


def _one_client(case: Case, out: Path, client: int) -> list[str]:
    own = ["--client-id", str(client), "--data-dir", str(case.data / f"client_{client}")]
    return [*own, *_client_options(case, out)]


def _wait_for(processes: Processes, start: str) -> None:
    """Read the server's lines up to one that starts so.

    Raises:
        RunError: there was none.
    """
    if not any(line.startswith(start) for line in processes.lines()):
        processes.wait()
        raise RunError(f"the server ended before it said {start!r}")
