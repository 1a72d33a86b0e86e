"""The simulations of a comparison as tasks of a Ray cluster, which places them."""

import contextlib
import io
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError

from experiments.compare.plan import Register, Simulation, is_done, options_of
from experiments.compare.study import Study
from experiments.support.ray_cluster import connected, take_command_line
from sfl.cli import main_simulate
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError, reason_of
from sfl.nodes import NodeConfig

MOST_ATTEMPTS = 3  # of a run whose process dies


@contextlib.contextmanager
def on_ray(study: Study, own: Namespace) -> Iterator[tuple[Study, Simulation]]:
    """Yield a study, and how each of its simulations is carried out on a cluster.

    Raises:
        ConfigError: no machine of the cluster has as many CPUs as a run has threads.
        RunError: there is no cluster.
    """
    threads = study.node.threads
    with connected(own.address):
        cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        room = sum(int(of_one // threads) for of_one in cpus)
        if not room:
            raise ConfigError(
                f"--threads {threads}: the machines of the cluster have"
                f" {', '.join(f'{of_one:g}' for of_one in cpus)} CPUs"
            )
        yield replace(study, jobs=own.jobs or room), _Tasks(study)


class _Tasks:
    """Carries out simulations as tasks."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def __call__(self, run: RunConfig, node: NodeConfig, register: Register) -> Iterator[str]:
        """Carry out a simulation, and yield its lines when it has ended.

        Raises:
            RunError: it failed; the text is its last line.
        """
        # max_calls: a process of its own for each, since torch is set up once in a process
        once = ray.remote(max_calls=1, max_retries=MOST_ATTEMPTS - 1)(simulated)
        task = once.options(num_cpus=node.threads)
        call = task.remote(options_of(run, node), self._study.folder(run), sys.argv)
        register(lambda: ray.cancel(call, force=True))
        try:
            code, lines = ray.get(call)
        except RayError as error:
            raise RunError(reason_of(error)) from error
        if code:
            raise RunError(lines[-1])
        if not is_done(self._study, run):
            raise RunError("its folder is on another machine: --out must be one that all share")
        yield from lines


def simulated(options: Sequence[str], folder: Path, argv: Sequence[str]) -> tuple[int, list[str]]:
    """Carry out a simulation in this process; return its exit code, and what it has printed."""
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt whose process has died
    take_command_line(argv)
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main_simulate(options)
    return code, (errors if code else printed).getvalue().splitlines()
