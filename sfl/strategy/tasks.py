"""The tasks of several servers: ``--tasks`` and ``--task-weights``."""

import re
from dataclasses import dataclass, replace

from sfl.config import RunConfig, require
from sfl.data.client_data import DatasetSpec
from sfl.data.label_tasks import LABEL_TASKS, classes_of_tasks
from sfl.data.partition import OWN
from sfl.errors import ConfigError, DataError, counted
from sfl.model.class_weights import BALANCED, NONE
from sfl.model.topology import Topology
from sfl.nodes import TASK_NAME
from sfl.strategy.schemes import Exchange, Scheme

MOST_TASKS = 8
MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class Tasks:
    """What each of several servers predicts; without several servers, there are none."""

    names: tuple[str, ...] = ()  # of the main server first
    weights: tuple[float, ...] = ()  # of the losses

    def seen_by(self, spec: DatasetSpec, server: int) -> DatasetSpec:
        """Return a data set with the classes of one server's task; unknown ones stay.

        Raises:
            ConfigError: the task is none of its labels.
        """
        if not self.names:
            return spec
        name = self.names[server]
        try:
            known = classes_of_tasks(name, spec.classes)
        except DataError as error:
            raise ConfigError(f"--tasks {name}: {error}") from error
        return replace(spec, classes=known.get(name, spec.classes))

    @property
    def columns(self) -> tuple[str, ...]:
        """The tasks that are further labels of own data."""
        return tuple(name for name in self.names if name not in LABEL_TASKS)

    @classmethod
    def of(cls, run: RunConfig, topology: Topology, scheme: Scheme) -> "Tasks":
        """Return the tasks of a run by its options.

        Raises:
            ConfigError: they do not fit its topology, data or scheme.
        """
        if not topology.has_tasks:
            for name in ("tasks", "task_weights"):
                given = getattr(run, name)
                require(not given, name, given, "left out, without --topology multi-task")
            return cls()
        names = tuple(name.strip() for name in run.tasks.split(","))
        if not 2 <= len(set(names)) == len(names) <= MOST_TASKS:
            raise ConfigError(
                f"--tasks {run.tasks or '(none)'}: --topology {run.topology} takes 2 to"
                f" {MOST_TASKS} different tasks, as digit,parity: a server each"
            )
        for name in names:
            known = name in LABEL_TASKS or (run.partition == OWN and re.fullmatch(TASK_NAME, name))
            wanted = f"one of {', '.join(LABEL_TASKS)}; or, with own data, NAME of an array y_NAME"
            require(bool(known), "tasks", name, wanted)
        cut = scheme.exchange is Exchange.CUT and not scheme.pooled
        require(cut, "scheme", run.scheme, f"a scheme with a cut, with --topology {run.topology}")
        same = run.class_weights in (NONE, BALANCED)
        require(same, "class_weights", run.class_weights, "none or balanced: tasks differ in it")
        return cls(names, _weights(run.task_weights, len(names)))


NO_TASKS = Tasks()


def addresses_of(text: str) -> dict[str, str]:
    """Return where clients reach the server of each further task, by ``--task-servers``.

    Raises:
        ConfigError: one is named twice.
    """
    pairs = [one.partition("=") for one in text.split(",") if one]
    found = {name.strip(): address.strip() for name, _, address in pairs}
    if len(found) < len(pairs):
        raise ConfigError(f"--task-servers {text}: names a task twice")
    return found


def _weights(text: str, count: int) -> tuple[float, ...]:
    """Return the weight of each of so many tasks' losses.

    Raises:
        ConfigError: the text has others.
    """
    try:
        found = tuple(map(float, text.split(","))) if text else (1.0,) * count
    except ValueError:
        found = ()
    fine = all(0 < w <= MOST_WEIGHT for w in found)
    if len(found) != count or not fine:
        raise ConfigError(
            f"--task-weights {text}: give {counted(count, 'number')} above 0, at most"
            f" {MOST_WEIGHT:g}: one for each of --tasks"
        )
    return found
