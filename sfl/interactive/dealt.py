"""The samples of a run's clients, dealt out again from the data set on this machine."""

import functools
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sfl.archive.run_folder import say
from sfl.conversation.report import DataReport
from sfl.data.client_data import ClientData, Source, batch_indices, load, part_of
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN
from sfl.errors import ConfigError, DataError, RunError
from sfl.nodes import NodeConfig
from sfl.runtime.recorded_run import RecordedRun
from sfl.runtime.simulation import pooled
from sfl.runtime.task_servers import at_each_server
from sfl.values import Position


@dataclass(frozen=True)
class StepSamples:
    """The training samples of one step.

    indices  (B,) int64, into the data set's training samples, in the order of the batch
    x        (B, C, H, W) float32, as the step saw them: augmented and normalised
    y        (B,) int64, their labels; zeros if the client has none
    """

    client: int
    indices: Tensor
    x: Tensor
    y: Tensor


class Dealt:
    """Who has which samples, derived from the seed as each client does it.

    Raises:
        DataError: the clients' data are their own, or the data set differs from the run's.
    """

    def __init__(self, recorded: RecordedRun, node: NodeConfig) -> None:
        run = recorded.run
        if run.partition == OWN:
            raise DataError(
                f"{recorded.archive.root}: --partition own: each client's samples lie on its"
                " machine alone; the seed tells only how a data set is dealt out"
            )
        self._recorded = recorded
        spec = dataset_of(run, recorded.allowed)
        source = Source(node.data_path, node.cache_path, spec.input_shape, say)
        loaded = load(spec, source)
        recipe = recorded.recipe
        dealt = {k: part_of(spec, run, k, loaded) for k in range(run.clients)}
        parts = {k: at_each_server(part, recipe)[recipe.server] for k, part in dealt.items()}
        of_all = [_indices(part, loaded[0].rows) for part in parts.values()]
        self._indices = dict(enumerate(of_all))
        if recorded.scheme.pooled:
            parts, self._indices = {0: pooled(parts, run)}, {0: torch.cat(of_all)}
        self._parts = parts
        self._checked = functools.cache(self._check)

    def data(self, client: int) -> ClientData:
        """Return a client's samples."""
        if client not in self._parts:
            raise RunError(f"{self._recorded.archive.root} has no client_{client}")
        self._checked(client)
        return self._parts[client]

    def _check(self, client: int) -> None:
        """Check that a client's samples are those that it reported to the run.

        Raises:
            DataError: they are not.
        """
        recorded, part = self._recorded, self._parts[client]
        # A client may have left its labels out of the digest.
        digests = {DataReport.of(part, recorded.run, keeps_labels=k).digest for k in (False, True)}
        if recorded.data["digests"].get(str(client)) not in digests:
            raise DataError(
                f"the samples of {recorded.run.dataset} on this machine are not those that"
                f" client_{client} of {recorded.archive.root} had: give data_dir= the folder of the"
                " same data set"
            )

    def behind(self, of_step: Any) -> StepSamples:
        """Return the samples of a step of ``Run.tensors()``, or of a row of ``Run.steps``.

        Raises:
            ConfigError: it is neither.
            RunError: the run has no such step.
        """
        try:
            client, round_index, step = (
                int(of_step[name] if isinstance(of_step, pd.Series) else getattr(of_step, name))
                for name in ("client", "round", "step")
            )
        except (AttributeError, KeyError) as error:
            raise ConfigError("samples: give one of tensors(), or a row of steps") from error
        data, recorded = self.data(client), self._recorded
        run = recorded.run
        drawn_as = recorded.recipe.leader(client)
        drawn = batch_indices(len(data.train), run, round_index=round_index, client=drawn_as)
        rows = dict(enumerate(drawn)).get(step) if 0 <= round_index < run.rounds else None
        if rows is None:
            raise RunError(
                f"client_{client} of {recorded.archive.root} has no step {step} of round"
                f" {round_index}"
            )
        at = Position(run.run, round_index, step, client)
        return StepSamples(
            client, self._indices[client][rows], *data.training_batch(rows, at)
        )  # fmt: skip


def _indices(part: ClientData, of_data_set: Tensor | None) -> Tensor:
    """Return the index in the data set of each of a client's training samples: (N,) int64.

    Both are rows of the same stored images. ``of_data_set``: the rows that belong to the data set's
    training samples, in their order; None: all of them.
    """
    assert part.train.rows is not None
    if of_data_set is None:
        return part.train.rows
    place = torch.full((int(of_data_set.max()) + 1,), -1)
    place[of_data_set] = torch.arange(len(of_data_set))
    return place[part.train.rows]
