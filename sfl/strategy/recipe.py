"""The recipe of a run: the names in ``RunConfig`` resolved to objects, once.

Server, client, simulation, replay and programs make it from the run's configuration and pass it
on: no code inside a round looks a name up or parses an option.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from sfl.config import RunConfig
from sfl.data.augment import NONE, changes_of
from sfl.data.client_data import parse_normalize
from sfl.data.partition import check_partition
from sfl.errors import ConfigError
from sfl.model import class_weights
from sfl.model.task import Task
from sfl.model.training import Training
from sfl.model.zoo import ModelSpec, model_spec
from sfl.registry import named, with_options
from sfl.strategy.aggregate import RULES, Result
from sfl.strategy.schemes import SCHEMES, Exchange, Scheme
from sfl.values import KEEP_NOTHING, KeepModels, KeepTensors
from sfl.weights.stores import check_address


@dataclass(frozen=True, eq=False)
class Recipe:
    """A run's configuration, with the rows and functions that its options name."""

    run: RunConfig  # with cut and schedule length filled in
    scheme: Scheme
    model: ModelSpec
    cut: int  # number of blocks in front of it; without a cut, it separates gradient clipping
    training: Training
    rule: Callable[..., Result]  # aggregation rule
    keep: KeepModels  # rounds whose files are kept

    @property
    def task(self) -> Task:
        return self.training.task

    @classmethod
    def of(cls, run: RunConfig, allowed: Collection[str] | None = None) -> "Recipe":
        """Resolve a run's options; ``allowed`` as in ``registry.look_up``.

        Raises:
            ConfigError: a scheme, task, model, cut, partition, optimiser, schedule, aggregation
                rule or store is unknown, or does not accept its options.
        """
        row = named("scheme", run.scheme, SCHEMES)
        check_address(run.weights)
        check_partition(run)
        changes_of(run.augment or NONE)
        class_weights.parse(run.class_weights)
        if run.normalize:
            parse_normalize(run.normalize)
        rule = with_options("aggregation", run.aggregation, RULES)
        model = model_spec(run.model, allowed)
        cut = model.cut if run.cut is None else run.cut
        if cut is None:
            raise ConfigError(f"--model {run.model} is your own: say with --cut where to cut it")
        run = replace(run, cut=cut, lr_rounds=run.lr_rounds or run.rounds)
        return cls(run, row, model, cut, Training.of(run, cut), rule, _keep(run, row))

    def changed(self, **options: Any) -> "Recipe":
        """Return this recipe with other values for options that are not names."""
        run = replace(self.run, **options)
        return replace(self, run=run, keep=_keep(run, self.scheme))


def _keep(run: RunConfig, row: Scheme) -> KeepModels:
    """Return which rounds' files are kept; models for replay only where tensors are recorded."""
    has_tensors = row.exchange is not Exchange.NOTHING
    tensors = KeepTensors.parse(run.keep_tensors) if has_tensors else KEEP_NOTHING
    return KeepModels.parse(run.keep_models, tensors)
