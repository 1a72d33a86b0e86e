"""The runs of a report: those that differ in the seed alone belong together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sfl.config import flag
from sfl.errors import ConfigError, RunError, SflError, counted
from sfl.interactive.run import Run, distinct, told_apart

MOST_OF_LABEL = 40  # characters of the options that differ; if they are more, names of runs


@dataclass(frozen=True)
class Group:
    """Runs of the same options with different seeds: one curve, one row of each table."""

    label: str
    runs: Sequence[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]


@dataclass(frozen=True)
class Confusion:
    """How often samples of each class are taken for each: ``counts`` (classes, classes)."""

    counts: np.ndarray[Any, Any]  # a row: the samples of one class
    classes: Sequence[str]
    missing: Sequence[str] = ()  # why clients' predictions are not in it, a line each


def gather(runs: Sequence[Run], labels: Sequence[str] = ()) -> list[Group]:
    """Return the groups of these runs, in order.

    A seed that is there twice begins another group. ``labels``: by default the options that differ
    or, if these are many, the name of the first run of each.

    Raises:
        ConfigError: there are more or fewer labels than groups, or one is empty.
    """
    seen: Counter[object] = Counter()
    members: dict[object, list[Run]] = {}
    for run in runs:
        same = repr(run.options)
        seen[same, run.config.seed] += 1
        members.setdefault((same, seen[same, run.config.seed]), []).append(run)
    groups = list(members.values())
    if labels and len(labels) != len(groups):
        of_each = "; ".join(", ".join(run.name for run in group) for group in groups)
        raise ConfigError(
            f"--labels: has {len(labels)}, for {counted(len(groups), 'curve')} of runs that differ"
            f" in more than the seed: {of_each}"
        )
    if not all(label.strip() for label in labels):
        raise ConfigError("--labels: one is empty; give a name for each curve, as A,B")
    names = [group[0].name for group in groups]
    told = labels or told_apart([group[0].options for group in groups], names)
    if max(map(len, told)) > MOST_OF_LABEL and not labels:
        told = names
    told = distinct(told)
    return [Group(*both) for both in zip(told, groups, strict=True)]


def shown_metric(run: Run) -> tuple[str, str]:
    """Return the metric shown beside the loss and its title, also if the run's task is unknown."""
    try:
        return run.recipe.task.shown
    except SflError:  # a model of a user's own, say
        names = [n.removeprefix("val_") for n in run.rounds.columns if n.startswith("val_")]
        own = [name for name in names if name != "loss"] or ["loss"]
        return own[0], own[0]


def confusion(group: Group) -> Confusion:
    """Return the confusion of a group's recorded predictions, added up over its seeds.

    Raises:
        RunError: none is recorded on this machine, or they are no classes.
    """
    counts: list[np.ndarray[Any, Any]] = []
    missing: list[str] = []
    for run in group.runs:
        for client in tested(run):
            try:
                counts.append(_count(run, client))
            except SflError as error:
                missing.append(str(error))
    if not counts:
        raise RunError(missing[0] if missing else "no test set was evaluated")
    return Confusion(np.sum(counts, axis=0), group.first.classes, missing)


def tested(run: Run) -> list[int]:
    """Return the clients whose test set was evaluated."""
    rows = run.clients
    known = rows.filter(regex="^test_").notna().any(axis=1)  # the loss of a diverged run is none
    return sorted(rows[known]["client"].unique())


def _count(run: Run, client: int) -> np.ndarray[Any, Any]:
    kept, task = run.predictions(client), run.recipe.task
    labels = kept["labels"]
    if task.confusion is None or not ((labels >= 0) & (labels < len(run.classes))).all():
        raise RunError(f"--task {run.config.task} predicts no classes")
    counts: np.ndarray[Any, Any] = task.confusion(kept[task.output_name], labels).numpy()
    return counts


def options(group: Group) -> dict[str, str]:
    """Return the options that the runs of a group have in common, as texts."""
    role = {"role": group.first.role} if group.first.role else {}
    return texts(asdict(group.first.config) | role)


def texts(config: dict[str, Any]) -> dict[str, str]:
    """Return the values of options as texts, without those that tell runs of a group apart."""
    return {flag(n): _text(v) for n, v in config.items() if n not in ("run", "seed")}


def environment(group: Group) -> dict[str, str]:
    """Return what a group's runs were computed with, as texts; where they differ, all values."""
    return _together([_environment(run) for run in group.runs])


def _environment(run: Run) -> dict[str, Any]:
    record = run.archive.environment()
    tables = {name: record.get(name) for name in ("fingerprint", "packages")}
    found: dict[str, Any] = {n: v for n, v in record.items() if isinstance(v, str)}
    found.pop("started", None)  # stands beside the run's name
    for table in tables.values():
        found |= table if isinstance(table, dict) else {}
    clients = record.get("clients")
    for name, theirs in (clients if isinstance(clients, dict) else {}).items():
        own = theirs.items() if isinstance(theirs, dict) else ()
        found |= {f"{name}: {n}": v for n, v in own if v != found.get(n)}
    command = record.get("command_line")
    words = command if isinstance(command, list) else []
    is_text = all(isinstance(word, str) for word in words)
    return found | {"command line": " ".join(words) if is_text else ""}


def _together(tables: Sequence[dict[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {
        name: "; ".join(dict.fromkeys(_text(table.get(name, "-")) for table in tables))
        for name in names
    }


def _text(value: object) -> str:
    return "-" if value in (None, "") else str(value)
