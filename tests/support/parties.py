"""Runs over hops and with several servers, as processes: their parties, and what they leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sfl.reports.watch_state import OVER, Watched
from sfl.runtime.recorded_run import load
from sfl.runtime.replay import check
from tests.support.launch import SCHEMES, Launcher, Program, free_port, wait_for
from tests.support.weights import weights

SERVER = "server"


@dataclass
class Chain:
    """The parties of a run, by name: server, hop_1 ..., task_parity ..., client_0 ..."""

    launcher: Launcher
    num_hops: int
    num_clients: int
    of_server: list[object]
    of_others: list[object]  # options of hops, further servers and clients
    programs: dict[str, Program] = field(default_factory=dict)
    tasks: Sequence[str] = ()  # of further servers
    hosts: bool = False  # whether all clients are in one process
    of_clients: Sequence[object] = ()  # further options of clients; {k} is a client's number

    def __post_init__(self) -> None:
        places = range(1, self.num_hops + 1)
        self.ports = {place: free_port() for place in places}
        self._next = {**self.ports, self.num_hops + 1: self.launcher.port}
        self.first_port = self._next[1]
        self.task_ports = {name: free_port() for name in self.tasks}
        self.at_tasks = dict(self.task_ports)  # where clients reach them: perhaps over a proxy

    @property
    def names(self) -> list[str]:
        hops = [f"hop_{place}" for place in self.ports]
        tasks = [f"task_{name}" for name in self.tasks]
        all_ids = [f"0-{self.num_clients - 1}"] if self.hosts else range(self.num_clients)
        clients = [f"client_{ids}" for ids in all_ids]
        return [SERVER, *reversed(hops), *tasks, *clients]

    def start(self, name: str, crash_at: str = "") -> Program:
        """Start a party, or start it again."""
        kind, _, number = name.partition("_")
        env = {"SFL_CRASH_AT": crash_at} if crash_at else {}
        if name == SERVER:
            program = self.launcher.server(*self.of_server, *self._where_tasks_are, env=env)
        elif kind == "task":
            port, to = self.task_ports[number], self.launcher.port
            program = self.launcher.follower(f"task:{number}", port, to, *self.of_others, env=env)
        elif kind == "hop":
            place = int(number)
            program = self.launcher.hop(
                place, self.ports[place], self._next[place + 1], *self.of_others, env=env
            )
        else:
            address = self.launcher.at(f"127.0.0.1:{self.first_port}")
            which = ["--client-ids" if self.hosts else "--client-id", number]
            mine = [str(option).replace("{k}", number) for option in self.of_clients]
            own = [*which, *self.of_others, *mine]
            program = self.launcher.client(*address, *own, env=env)
        self.programs[name] = program
        return program

    def run(self, crashes: Mapping[str, str] | None = None) -> Path:
        """Start all parties, and return the server's folder at the end.

        ``crashes``: where parties are killed, by name; each is started again.
        """
        crashes = crashes or {}
        for name in self.names:
            program = self.start(name, crashes.get(name, ""))
            if not name.startswith("client"):
                wait_for(program, "listening")
        for name in crashes:
            victim = self.programs[name].process
            victim.join(60)
            assert victim.exitcode == -9, self.programs[name].out + self.programs[name].err
            if name == SERVER:
                self.of_server = ["--resume", self.folder, *self.of_others]
            self.start(name)
        for program in self.programs.values():
            try:
                program.ended_with(0)
            except AssertionError as error:  # another party may say why
                for name, other in self.programs.items():
                    error.add_note(f"{name}: {other.err}{other.out}")
                raise
        return self.folder

    @property
    def _where_tasks_are(self) -> list[str]:
        scheme = SCHEMES[self.launcher.transport]
        told = [f"{name}={scheme}127.0.0.1:{port}" for name, port in self.at_tasks.items()]
        return ["--task-servers", ",".join(told)] if told else []

    @property
    def folder(self) -> Path:
        return self.launcher.folder / "server" / "r"


def follower_folders(run: Path) -> list[Path]:
    """Return the folders of a run's hops and further servers, which lie beside its server's."""
    found = {*run.parent.parent.glob(f"hop_*/{run.name}")}
    return sorted(found | {*run.parent.parent.glob(f"task_*/{run.name}")})


def is_over(folder: Path) -> bool:
    """Return whether whoever watches the folder sees that the run is over."""
    seen, silent_s = Watched(folder).look()
    return seen.state(silent_s) == OVER


def weights_of_all(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights that all servers and hops have recorded."""
    found = weights(run)
    for folder in follower_folders(run):
        of_task = folder.parent.name.startswith("task")  # a server's files have equal names
        where = f"{folder.parent.name}/" if of_task else ""
        found |= {f"{where}{name}": tensor for name, tensor in weights(folder).items()}
    return found


def replayed(folder: Path, model: str) -> tuple[int, int]:
    """Return how many gradients and models of a party a replay has found equal; none differs."""
    report = check(load(folder, allow_import=model))
    assert report.findings == [], report.summary
    return report.checked, report.models
