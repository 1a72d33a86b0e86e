"""The recipe of a run: the names in ``RunConfig`` resolved to objects, once.

Server, client, simulation, replay and programs make it from the run's configuration and pass it
on: no code inside a round looks a name up or parses an option.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfl.config import RunConfig
from sfl.data.augment import NONE, changes_of
from sfl.data.client_data import parse_normalize
from sfl.data.partition import check_partition
from sfl.errors import ConfigError, counted
from sfl.model import class_weights
from sfl.model.task import Task
from sfl.model.topology import FRONT, TOPOLOGIES, Holder, check_cuts, default_topology
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
    cuts: tuple[int, ...]  # number of blocks in front of each; without a cut, see ``Training``
    segments: Mapping[str, Holder]  # the holder of each segment, from input to output
    training: Training
    rule: Callable[..., Result]  # aggregation rule
    keep: KeepModels  # rounds whose files are kept
    withholds_labels: bool = False  # a client's choice, in schemes without a cut as well

    @property
    def shares_labels(self) -> bool:
        """Whether the clients' labels are sent: the server computes the loss of a cut model."""
        return [*self.segments.values()][-1] is Holder.SERVER

    @property
    def keeps_labels(self) -> bool:
        """Whether nothing of the labels may be sent: the model is cut, and they stay all the same.

        Without a cut no label is sent, but figures of each class are, unless a client chooses.
        """
        return self.withholds_labels or (self.is_cut and not self.shares_labels)

    @property
    def is_cut(self) -> bool:
        return self.scheme.exchange is Exchange.CUT

    @property
    def title(self) -> str:
        """The run's model and how it is cut, for users."""
        run = self.run
        return f"{run.model} cut at {run.cut}, {run.topology}" if self.is_cut else run.model

    @property
    def task(self) -> Task:
        return self.training.task

    @classmethod
    def of(
        cls,
        run: RunConfig,
        allowed: Collection[str] | None = None,
        *,
        withholds_labels: bool = False,
    ) -> "Recipe":
        """Resolve a run's options; ``allowed`` as in ``registry.look_up``.

        Raises:
            ConfigError: a scheme, task, model, cut, partition, optimiser, schedule, aggregation
                rule or store is unknown, or does not accept its options; or the run shares labels,
                which this client withholds.
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
        cuts = parse_cuts(run.cut, model.cut, run.model)
        topology = run.topology or default_topology(len(cuts))
        placed = named("topology", topology, TOPOLOGIES)
        check_cuts(topology, placed, cuts)
        is_cut = row.exchange is Exchange.CUT
        segments = placed.segments(len(cuts)) if is_cut else {FRONT: Holder.CLIENT}
        cut = run.cut if len(cuts) > 1 else cuts[0]
        run = replace(run, cut=cut, topology=topology, lr_rounds=run.lr_rounds or run.rounds)
        training = Training.of(run, cuts)
        keep = _keep(run, row)
        recipe = cls(run, row, model, cuts, segments, training, rule, keep, withholds_labels)
        if recipe.keeps_labels:
            _check_private(recipe)
        return recipe

    def changed(self, **options: Any) -> "Recipe":
        """Return this recipe with other values for options that are not names."""
        run = replace(self.run, **options)
        return replace(self, run=run, keep=_keep(run, self.scheme))


def parse_cuts(cut: int | str | None, default: int | None, model: str) -> tuple[int, ...]:
    """Return the numbers of blocks in front of each cut; ``default``: the model's own cut.

    Raises:
        ConfigError: they do not rise, or the model has no cut of its own.
    """
    if cut is None and default is None:
        raise ConfigError(f"--model {model} is your own: say with --cut where to cut it")
    texts = str(default if cut is None else cut).split(",")
    cuts = tuple(int(text) for text in texts if re.fullmatch(r"\d{1,9}", text, re.ASCII))
    if len(cuts) < len(texts) or any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ConfigError(f"--cut {cut}: give numbers of blocks that rise, as 3 or 3,5")
    return cuts


def _check_private(recipe: Recipe) -> None:
    """Check that a run whose labels stay at the clients needs nothing that tells them.

    Raises:
        ConfigError: it does.
    """
    run = recipe.run
    named = "--keep-labels" if recipe.withholds_labels else f"--topology {run.topology}"
    if recipe.shares_labels:
        raise ConfigError(
            f"{named}: the server runs --topology {run.topology} with --cut {run.cut}, which sends"
            f" it the labels; they would stay here with {_private_choices()}"
        )
    if run.class_weights == "balanced":
        raise ConfigError(
            f"--class-weights balanced: with {named} no client tells how many"
            " samples it has of each class; give a weight for each class"
        )
    if run.batch_size == 1:
        raise ConfigError(
            f"--batch-size 1: with {named} the loss of a single sample would be"
            " sent, which may tell its label; give at least 2"
        )


def _private_choices() -> str:
    """Return the options with which no label is sent."""
    topologies = [
        f"{name} ({counted(least, 'cut')})"
        for name, row in TOPOLOGIES.items()
        if (least := next((n for n in row.num_cuts if row.holders(n)[-1] is Holder.CLIENT), 0))
    ]
    schemes = [name for name, row in SCHEMES.items() if row.exchange is not Exchange.CUT]
    return f"--topology {' or '.join(topologies)}, or --scheme {' or '.join(schemes)}"


def _keep(run: RunConfig, row: Scheme) -> KeepModels:
    """Return which rounds' files are kept; models for replay only where tensors are recorded."""
    has_tensors = row.exchange is not Exchange.NOTHING
    tensors = KeepTensors.parse(run.keep_tensors) if has_tensors else KEEP_NOTHING
    return KeepModels.parse(run.keep_models, tensors)
