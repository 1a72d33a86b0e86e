"""The runs of a comparison: which there are, which are done, and doing the others."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from experiments.processes import ROOT, Processes, last_line, running
from sfl.config import NodeConfig, RunConfig, flag
from sfl.errors import ConfigError, RunError

OVER = ("simulation", "sockets")
LAST_FILE = "server_log.txt"  # what a run writes into its manifest when it is over


@dataclass(frozen=True)
class Study:
    """One comparison: the cells of its table, and where they lie."""

    schemes: Sequence[str]
    partitions: Sequence[str]
    seeds: Sequence[int]
    run: RunConfig  # what all cells have in common
    node: NodeConfig
    over: str

    @property
    def runs(self) -> list[RunConfig]:
        """All cells, by partition, seed and scheme."""
        cells = itertools.product(self.partitions, self.seeds, self.schemes)
        return [
            replace(self.run, scheme=s, partition=p, seed=seed, run=run_name(s, p, seed))
            for p, seed, s in cells
        ]

    def folder(self, run: RunConfig) -> Path:
        return self.node.out_path / "server" / run.run

    def over_sockets(self, run: RunConfig) -> bool:
        """Say whether a cell is a run of real processes; ``central`` has no other side."""
        return self.over == "sockets" and run.scheme != "central"


def run_name(scheme: str, partition: str, seed: int) -> str:
    return f"{scheme}-{re.sub('[^a-z0-9.]', '-', partition)}-{seed}"[:64]


def names(text: str) -> list[str]:
    """Return the names of a list with commas; numbers belong to the name before them."""
    return re.split(r",(?=[a-z])", text)


def check_all(study: Study) -> None:
    """See that every cell can be run, before the first is.

    Raises:
        ConfigError: one cannot, or its folder holds a run with other options.
    """
    from sfl.check import check_run

    for run in study.runs:
        wanted = asdict(check_run(run))
        path = study.folder(run) / "config.json"
        if not path.is_file():
            continue
        recorded = json.loads(path.read_bytes())
        for name, value in wanted.items():
            if recorded.get(name) != value:
                raise ConfigError(
                    f"{path.parent} holds a run with {flag(name)} {recorded.get(name)}, not"
                    f" {value}: give another --out, or remove it"
                )


def is_done(study: Study, run: RunConfig) -> bool:
    """Say whether a cell's run came to its end."""
    import sfl.archive

    path = study.folder(run)
    return path.is_dir() and sfl.archive.open(path).lists(LAST_FILE)


def carry_out(study: Study, jobs: int, on_round: Callable[[RunConfig, str], None]) -> None:
    """Do what is missing, so many runs at a time; a run that was broken off begins again.

    ``on_round`` hears a line of each round that ends.

    Raises:
        RunError: some runs failed; the text says why. The others were carried out.
    """
    missing = [run for run in study.runs if not is_done(study, run)]
    failed: list[str] = []
    workers = _Workers(study, on_round)

    def work(run: RunConfig) -> None:
        try:
            workers.do(run)
        except RunError as error:
            failed.append(f"{run.run}: {error}")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.stop()
            raise
    if failed:
        raise RunError("; ".join(failed))


class _Workers:
    """Runs that are going on; they can be ended from another thread."""

    def __init__(self, study: Study, on_round: Callable[[RunConfig, str], None]) -> None:
        self._study = study
        self._on_round = on_round
        self._lock = threading.Lock()
        self._stopped = False
        self._active: list[subprocess.Popen[str]] = []

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._active:
                process.kill()

    def _register(self, process: "subprocess.Popen[str]") -> None:
        with self._lock:
            self._active.append(process)
            if self._stopped:
                process.kill()

    def do(self, run: RunConfig) -> None:
        """Carry out one run from its beginning."""
        shutil.rmtree(self._study.folder(run), ignore_errors=True)
        shutil.rmtree(self._study.node.out_path / "client" / run.run, ignore_errors=True)
        if self._study.over_sockets(run):
            self._over_sockets(run)
        else:
            self._in_one_process(run)

    def _in_one_process(self, run: RunConfig) -> None:
        command = [sys.executable, "-m", "experiments.simulate", *_options(run, self._study.node)]
        log = self._study.node.out_path / f"{run.run}.err"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(log, "w") as errors,
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            self._register(process)
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(run, line)
        if process.returncode:
            raise RunError(last_line(log))
        log.unlink()

    def _over_sockets(self, run: RunConfig) -> None:
        node = self._study.node
        with running(_options(run, node)) as processes:
            self._register(processes.server)
            processes.start_clients([processes.address] * run.clients, _options(None, node))
            self._follow(run, processes)

    def _follow(self, run: RunConfig, processes: Processes) -> None:
        for line in processes.lines():
            self._hear(run, line)
        processes.wait()

    def _hear(self, run: RunConfig, line: str) -> None:
        if line.startswith("round "):
            self._on_round(run, line.rstrip("\n"))


def _options(run: RunConfig | None, node: NodeConfig) -> list[str]:
    """Return a configuration as a command line, without what is the default."""
    options = []
    for config in (run, node):
        for spec in fields(config) if config else ():
            value = getattr(config, spec.name)
            if value is not None and value != spec.default:
                options += [flag(spec.name), str(value)]
    return options
