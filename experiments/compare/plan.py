"""The runs of a comparison: whether they can be run, which are done, and doing the others."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace

import sfl.archive
from experiments.compare.study import Study
from experiments.support.processes import ROOT, last_line, running
from sfl.archive.layout import MANIFEST
from sfl.archive.run_folder import is_being_written
from sfl.config import RunConfig, flag
from sfl.data.partition import OWN
from sfl.errors import ConfigError, RunError
from sfl.nodes import NodeConfig
from sfl.runtime.preflight import check_run
from sfl.weights.stores import SOCKET

LAST_FILE = "server_log.txt"  # what a run writes into its manifest when it is over


def check_all(study: Study) -> None:
    """See that every cell can be run, before the first is.

    Raises:
        ConfigError: one cannot, or its folder holds a run with other options.
    """
    for run in study.runs:
        node = {name: getattr(study.node, name) for name in ("threads", "device")}
        wanted = asdict(check_run(run).run) | node  # these change the last bit
        path = study.folder(run) / "config.json"
        if not path.is_file():
            continue
        recorded = json.loads(path.read_bytes())
        what = next(
            (f"{flag(n)} {recorded.get(n)}" for n, v in wanted.items() if recorded.get(n) != v), ""
        )
        was_over_sockets = "port" in recorded
        if not what and was_over_sockets != study.over_sockets(run):
            what = f"--over {'sockets' if was_over_sockets else 'simulation'}"
        if what:
            raise ConfigError(
                f"{path.parent} holds a run with {what}: give another --out, or remove it"
            )


def is_done(study: Study, run: RunConfig) -> bool:
    """Say whether a cell's run came to its end."""
    path = study.folder(run)
    if not (path / MANIFEST).is_file():  # it was broken off before it began
        return False
    return sfl.archive.open(path).lists(LAST_FILE)


Register = Callable[[Callable[[], None]], None]  # is told how to end what has been started
# Carries out a simulation, and yields its lines.
Simulation = Callable[[RunConfig, NodeConfig, Register], Iterable[str]]


def carry_out(
    study: Study, on_round: Callable[[RunConfig, str], None], simulation: Simulation
) -> None:
    """Do what is missing, so many runs at a time; a run that was broken off begins again.

    ``on_round`` hears a line of each round that ends; ``simulation``: as ``in_one_process``.

    Raises:
        RunError: some runs failed; the text says why. The others were carried out.
    """
    missing = [run for run in study.runs if not is_done(study, run)]
    failed: list[str] = []
    workers = _Workers(study, on_round, simulation)

    def work(run: RunConfig) -> None:
        try:
            workers.do(run)
        except RunError as error:
            failed.append(f"{run.run}: {error}")

    with ThreadPoolExecutor(study.jobs) as pool:
        try:
            list(pool.map(work, missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
    if failed:
        raise RunError("; ".join(failed))


def in_one_process(run: RunConfig, node: NodeConfig, register: Register) -> Iterator[str]:
    """Carry out a simulation as a process of this machine, and yield its lines.

    Raises:
        RunError: it failed; the text is its last line.
    """
    command = [sys.executable, "-m", "experiments.simulate", *options_of(run, node)]
    log = node.out_path / f"{run.run}.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        register(process.kill)
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RunError(last_line(log))
    log.unlink()


@contextlib.contextmanager
def on_this_machine(study: Study, own: Namespace) -> Iterator[tuple[Study, Simulation]]:
    """Yield a study and how each of its simulations is carried out."""
    yield replace(study, jobs=own.jobs or 1), in_one_process


class _Workers:
    """Runs that are going on; they can be ended from another thread."""

    def __init__(
        self, study: Study, on_round: Callable[[RunConfig, str], None], simulation: Simulation
    ) -> None:
        self._study, self._simulation = study, simulation
        self._on_round = on_round
        self._lock = threading.Lock()
        self._stopped = False
        self._active: list[Callable[[], None]] = []  # what ends each of them

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for kill in self._active:
                kill()

    def _register(self, kill: Callable[[], None]) -> None:
        with self._lock:
            self._active.append(kill)
            if self._stopped:
                kill()
                raise RunError("it was ended")

    def do(self, run: RunConfig) -> None:
        """Carry out one run from its beginning."""
        if is_being_written(self._study.folder(run) / LAST_FILE):
            raise RunError(f"another process is writing {self._study.folder(run)}")
        shutil.rmtree(self._study.folder(run), ignore_errors=True)
        shutil.rmtree(self._study.node.out_path / "client" / run.run, ignore_errors=True)
        if self._study.over_sockets(run):
            self._over_sockets(run)
        else:
            for line in self._simulation(run, self._study.node, self._register):
                self._hear(run, line)

    def _over_sockets(self, run: RunConfig) -> None:
        node = self._study.node
        with running(options_of(run, node)) as processes:
            self._register(processes.kill)
            trusted = [] if run.weights == SOCKET else ["--allow-weights", run.weights]
            processes.start_clients(
                [processes.address] * run.clients,
                [*options_of(None, node), *trusted],
                lambda k: _own_data(run, node, k),
            )
            if self._stopped:  # while they were being started
                processes.kill()
            for line in processes.lines():
                self._hear(run, line)
            processes.wait()

    def _hear(self, run: RunConfig, line: str) -> None:
        if line.startswith("round "):
            self._on_round(run, line.rstrip("\n"))


def _own_data(run: RunConfig, node: NodeConfig, client: int) -> list[str]:
    """Return where a client's own data lie: where the simulation looks for them."""
    return ["--data-dir", str(node.data_path / f"client_{client}")] if run.partition == OWN else []


def options_of(run: RunConfig | None, node: NodeConfig) -> list[str]:
    """Return a configuration as a command line, without what is the default."""
    options = []
    for config in (run, node):
        for spec in fields(config) if config else ():
            value = getattr(config, spec.name)
            if value is not None and value != spec.default:
                options += [flag(spec.name), str(value)]
    return options
