"""``Run``: a recorded run in a Python session, from its figures to its trained model.

::

    run = sfl.open_run("shared_files/server/first")
    run.rounds, run.steps                  # pandas frames
    run.model()                            # the trained nn.Module, on the CPU
    step = next(run.tensors(client=0, round=3))
    run.samples(step)                      # which training samples stand behind a recorded step
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import sfl.archive
from sfl.archive.layout import PREDICTIONS, model_path
from sfl.archive.reader import RunArchive, Step
from sfl.config import RunConfig
from sfl.conversation.party import TEST, TRAIN, VALIDATION
from sfl.data.client_data import ClientData, DatasetSpec, normalised
from sfl.data.datasets import dataset_of
from sfl.errors import ConfigError, RunError, after_round, counted
from sfl.files.torch_file import TensorSpec
from sfl.interactive.dealt import Dealt, StepSamples
from sfl.interactive.tables import clients_table, events, rounds_table, steps_table
from sfl.interactive.trained import Holders, Trained, by_run
from sfl.model.topology import BACK, FRONT
from sfl.nodes import NodeConfig, SimulationNode
from sfl.options import from_values, names_of
from sfl.runtime.local_network import Away
from sfl.runtime.recorded_run import RecordedRun, config_of, data_record, load
from sfl.runtime.simulation import simulate as simulate_run
from sfl.strategy.recipe import MAIN_ROLES, Recipe
from sfl.strategy.split_model import SplitModel
from sfl.tracking.trackers import trackers_of

FolderPath = str | os.PathLike[str]
PARTS = (TRAIN, VALIDATION, TEST)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What a model expects: pixels in [0, 1], minus ``mean``, divided by ``std``.

    ``mean`` and ``std`` have one value, or one for each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, ...]  # of one sample
    classes: tuple[str, ...]


class Run:
    """A recorded run, as it was on disk when it was opened.

    Rounds, steps and clients count from 0, as in the names of files; of a model, ``round`` is the
    round after which, by default the last finished one, and -1 is before the first.

    Raises (from any method):
        RunError: what is asked for does not lie on this machine; the message says where it does.
        IntegrityError: a file is damaged.
        ConfigError: the model or data set is a user's own that may not be imported.
    """

    def __init__(
        self, path: FolderPath, clients: Sequence[FolderPath] = (), **machine: Any
    ) -> None:
        """``machine``: options of ``NodeConfig``; ``threads`` are the run's if not given."""
        self.path = Path(path)
        self._threads = machine.get("threads")
        self._node: NodeConfig = from_values(NodeConfig, machine, "the options of this machine")
        self._archive = sfl.archive.open(path)
        self._holders = Holders(self._archive, [Path(folder) for folder in clients])

    def __repr__(self) -> str:
        return f"sfl.open_run({str(self.path)!r})"

    @functools.cached_property
    def _recorded(self) -> RecordedRun:
        """The run, opened to compute with it; sets torch's threads as in the run."""
        return load(self._archive, "cpu", self._threads, self._node.allow_import)

    @property
    def archive(self) -> RunArchive:
        """The run's files, see ``sfl.archive``."""
        return self._archive

    @functools.cached_property
    def config(self) -> RunConfig:
        """The run's options."""
        return config_of(self._archive)

    @property
    def role(self) -> str:
        """Whose record it is: ``hop:1``, ``task:parity``; "" is the main server's."""
        role = str(self._archive.config().get("role", ""))
        return "" if role in MAIN_ROLES else role

    @property
    def options(self) -> dict[str, Any]:
        """The run's options and ``role``, as a table; alike in runs of which the seed differs."""
        same = dataclasses.replace(self.config, run="", seed=0)
        return dataclasses.asdict(same) | {"role": self.role}

    @property
    def name(self) -> str:
        """The run's name, with its role unless it is the main server's."""
        return ", ".join(filter(None, (self.config.run or self.path.name, self.role)))

    @property
    def differences(self) -> Sequence[str]:
        """What in this process may change the last bit of results, against the run's; a line each.

        Threads, processor, release of torch, device: without a line, results are the run's.
        """
        return self._recorded.differences

    @functools.cached_property
    def rounds(self) -> pd.DataFrame:
        """The columns of ``rounds.csv``, a row for each round; see docs/metrics.md."""
        return rounds_table(self._archive)

    @functools.cached_property
    def steps(self) -> pd.DataFrame:
        """``round``, ``step``, ``client`` and the metrics of each training step."""
        return steps_table(self._archive)

    @functools.cached_property
    def clients(self) -> pd.DataFrame:
        """``round``, ``client`` and the metrics of each client's round."""
        return clients_table(self._archive)

    @functools.cached_property
    def events(self) -> Sequence[tuple[str, str]]:
        """The lines of the server's log, each with its time."""
        return events(self._archive)

    @functools.cached_property
    def _data(self) -> Mapping[str, Any]:
        return data_record(self._archive)

    @property
    def client_ids(self) -> Sequence[int]:
        """The clients of the run."""
        return sorted(map(int, self._data["num_samples"]))

    @property
    def classes(self) -> Sequence[str]:
        """The names of what the run's model tells apart."""
        return tuple(self._data["classes"])

    def tensors(self, client: int | None = None, round: int | None = None) -> Iterator[Step]:
        """Yield the recorded steps with their tensors, as ``sfl.archive`` does.

        There are none of rounds that ``--keep-tensors`` has removed, and of clients who were away.
        """
        if client is not None and client not in self.client_ids:
            raise RunError(f"{self.path} has no client_{client}")
        if round is not None and not 0 <= round < self.config.rounds:
            last = self.config.rounds - 1
            raise RunError(f"{self.path} has no round {round}: its rounds are 0 to {last}")
        return self._archive.steps(client=client, round=round)

    @property
    def recipe(self) -> Recipe:
        """What the run's options name."""
        return self._recorded.recipe

    @property
    def split(self) -> SplitModel:
        """How the run's model is cut, with its initial weights."""
        return self._recorded.split

    def last_round(self, round: int | None = None) -> int:
        """Return the last finished round, or ``round`` if it is finished."""
        return self._trained.last(round)

    @functools.cached_property
    def _trained(self) -> Trained:
        return Trained(self._recorded, self._holders)

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the model's segments, from input to output."""
        return tuple(self._recorded.split.specs)

    def segment(
        self, name: str, round: int | None = None, client: int | None = None
    ) -> nn.Sequential:
        """Return one segment of the trained model, in evaluation mode, on the CPU.

        ``client``: whose, of those that clients hold: as this client had trained it, before the
        average. Needed where each keeps its own.
        """
        return self._trained.segment(name, round, client)

    def front(self, round: int | None = None, client: int | None = None) -> nn.Sequential:
        """Return the first segment, which clients hold, as ``segment`` does."""
        return self.segment(FRONT, round, client)

    def back(self, round: int | None = None) -> nn.Sequential:
        """Return the server's first segment, as ``segment`` does."""
        return self.segment(BACK, round)

    def model(self, round: int | None = None, client: int | None = None) -> nn.Module:
        """Return the whole trained model, its segments joined in order, as ``segment`` does.

        Its state dict is that of the model before it was cut. With ``--topology vertical`` it takes
        one tensor for each client.
        """
        return self._trained.model(round, client)

    @property
    def data_spec(self) -> DatasetSpec:
        """The kind of the run's samples, normalised as in the run."""
        recorded = self._recorded
        return normalised(dataset_of(recorded.run, recorded.allowed), recorded.run)

    @property
    def normalisation(self) -> Normalisation:
        """What the run's model expects of its input, and the names of what it tells apart."""
        data, spec = self._recorded.data, self.data_spec
        is_table = len(data["input_shape"]) < len(spec.input_shape)  # own data, aligned by ids
        figures = (0.0, 1.0) if is_table else (spec.mean, spec.std)
        mean, std = (
            tuple(map(float, f if isinstance(f, tuple) else (f,))) for f in figures
        )  # a user's own may be ints
        return Normalisation(mean, std, tuple(data["input_shape"]), tuple(data["classes"]))

    @functools.cached_property
    def _dealt(self) -> Dealt:
        return Dealt(self._recorded, self._node)

    def data(self, client: int = 0) -> ClientData:
        """Return a client's samples, dealt out again from the data set on this machine.

        Raises:
            DataError: the clients' data are their own, or the data set differs from the run's.
        """
        return self._dealt.data(client)

    def batches(self, part: str = TEST, client: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``x`` and ``y`` of a part of a client's samples, in the run's evaluation batches.

        ``part``: "train", "validation" or "test". Raises as ``data``.
        """
        if part not in PARTS:
            raise RunError(f"samples have no part {part!r}: give one of {', '.join(PARTS)}")
        data, split = self.data(client), self._recorded.split
        samples, start = getattr(data, part), 0
        for size in split.evaluation_sizes(len(samples)):
            yield data.batch(samples, slice(start, start + size))
            start += size

    def samples(self, step: Any) -> StepSamples:
        """Return the training samples behind a step: one of ``tensors()``, or a row of ``steps``.

        They are derived from the seed and the data set on this machine. Raises as ``data``.
        """
        return self._dealt.behind(step)

    @property
    def _tested(self) -> Collection[int]:
        """The rounds after which a test set was evaluated; a hop is not told, so all may be."""
        try:
            rounds = self.rounds
        except RunError:
            return range(self.config.rounds)
        figures = rounds.filter(regex="^test_").notna().any(axis=1)  # a diverged loss is none
        return set(rounds["round"][figures])

    def predictions(self, client: int = 0, round: int | None = None) -> dict[str, Tensor]:
        """Return the recorded ``labels`` and outputs of a client's test set, (N,) and (N, classes).

        They are kept after the last round, and after those that ``--test-every`` names. Of samples
        whose columns several clients have, the client with the labels has them.
        """
        data, recipe = self._recorded.data, self._recorded.recipe
        task, leader = recipe.task, recipe.leader(client)
        if str(client) not in data["num_samples"]:
            raise RunError(f"{self.path} has no client_{client}")
        count, outputs = data["num_samples"][str(client)][TEST], task.output_shape
        if leader != client or not count:
            why = f"client_{leader} has those of all" if count else "it has no test samples"
            raise RunError(f"{self.path} has no predictions of client_{client}: {why}")
        last = self._trained.last(round)
        if last not in self._tested:
            raise RunError(f"{self.path}: no test set was evaluated {after_round(last)}")
        path = model_path(PREDICTIONS, last, client=client)
        spec = {
            "labels": task.labels_spec(count),
            task.output_name: TensorSpec((count, *outputs(len(data["classes"]))), torch.float32),
        }
        return self._holders.state(path, spec, client, is_own=self._recorded.is_of_task)

    def plot(self, *others: "Run") -> Any:
        """Draw this run, and others beside it; return the two axes. See ``plot``."""
        return plot([self, *others])


def open_run(path: FolderPath, *, clients: Sequence[FolderPath] = (), **machine: Any) -> Run:
    """Open a recorded run by its server's folder, ``shared_files/server/<run>``.

    ``clients``: clients' folders that were brought here; those of a run of this machine are found.
    ``machine``: options of this machine as keywords, such as ``data_dir`` or ``allow_import``.

    Raises:
        RunError: the folder is not a run's.
        IntegrityError: its manifest is damaged.
        ConfigError: there is no such option.
    """
    return Run(path, clients, **machine)


def open_runs(
    paths: Sequence[FolderPath], *, clients: Sequence[FolderPath] = (), **machine: Any
) -> list[Run]:
    """Open several runs as ``open_run`` does; each takes those of the clients' folders of its own.

    Raises:
        RunError, IntegrityError, ConfigError: as for ``open_run``; or a folder is of no run.
    """
    brought = by_run([*map(sfl.archive.open, paths)], [Path(folder) for folder in clients])
    return [
        open_run(path, clients=own, **machine) for path, own in zip(paths, brought, strict=True)
    ]


def simulate(config: RunConfig, *, init: FolderPath = "", **machine: Any) -> Run:
    """Run server and clients in this process, as ``experiments.simulate`` does; return the run.

    ``init``: weights to start from: a run's folder, a file of ``sfl-export --to torch``, or
    "pretrained".

    ``machine``: options of this machine as keywords, such as ``out``, ``data_dir``, ``threads`` or
    ``track``.

    Raises:
        ConfigError, DataError, RunError: as for server and clients.
    """
    given = machine | {"init": os.fspath(init)}
    node = from_values(SimulationNode, given, "the options of this machine")
    run = from_values(RunConfig, dataclasses.asdict(config), "the configuration")
    away = [Away.parse(text) for text in node.away.split(",") if text]
    path = simulate_run(run, node, away, trackers=trackers_of(node.track))
    own = [name for name in (node.allow_import, run.model, run.dataset) if ":" in name]
    here = {name: value for name, value in machine.items() if name in names_of(NodeConfig)}
    return open_run(path, **here | {"allow_import": ",".join(own)})


def plot(runs: Sequence[Run], labels: Sequence[str] = ()) -> Any:
    """Draw the loss and the task's metric by round, of several runs; return the two axes.

    ``labels``: of the runs; by default, the options in which they differ.

    Raises:
        ConfigError: there is no run, or there are more or fewer labels than runs.
    """
    from sfl.interactive.curves import draw  # takes a second to import

    if not runs:
        raise ConfigError("plot: there is no run to draw; give at least one")
    if labels and len(labels) != len(runs):
        raise ConfigError(f"labels: has {len(labels)}, for {counted(len(runs), 'run')}")
    options = [run.options | {"seed": run.config.seed} for run in runs]
    names = distinct(labels or told_apart(options, [run.name for run in runs]))
    metric, title = runs[0].recipe.task.shown
    return draw(dict(zip(names, (run.rounds for run in runs), strict=True)), metric, title)


def told_apart(options: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return a label for each run: the options that differ, or else its name."""
    differ = [n for n in options[0] if len({repr(table[n]) for table in options}) > 1]
    labels = [
        ", ".join(f"{name} {'-' if table[name] == '' else table[name]}" for name in differ)
        for table in options
    ]
    if len(set(labels)) == len(labels) and differ:
        return labels
    return [f"{label} ({n})" if label else n for label, n in zip(labels, names, strict=True)]


def distinct(labels: Sequence[str]) -> list[str]:
    """Return the labels, numbered if some are the same: a curve or column goes by its label."""
    if len(set(labels)) == len(labels):
        return [*labels]
    return [f"{label} #{labels[: k + 1].count(label)}" for k, label in enumerate(labels)]
