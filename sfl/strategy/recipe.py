"""The recipe of a run: the names in ``RunConfig`` resolved to objects, once.

Server, client, simulation, replay and programs make it from the run's configuration and pass it
on: no code inside a round looks a name up or parses an option.
"""

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfl import seeds
from sfl.config import RunConfig, flag, require
from sfl.data.augment import NONE, changes_of
from sfl.data.client_data import parse_normalize
from sfl.data.partition import OWN, VERTICAL, check_partition
from sfl.errors import ConfigError, counted
from sfl.model import class_weights
from sfl.model.class_weights import BALANCED
from sfl.model.fusion import FUSIONS
from sfl.model.task import Task
from sfl.model.topology import (
    FRONT,
    TOPOLOGIES,
    Holder,
    check_cuts,
    default_topology,
    hop_of,
    hops_of,
)
from sfl.model.training import Training
from sfl.model.zoo import ModelSpec, model_spec
from sfl.registry import named, with_options
from sfl.strategy.aggregate import RULES, Result
from sfl.strategy.schemes import SCHEMES, Exchange, Fronts, Scheme, shared
from sfl.strategy.tasks import NO_TASKS, Tasks
from sfl.values import KEEP_NOTHING, KeepModels, KeepTensors, StopWhen
from sfl.weights.stores import SOCKET, check_address

MAIN_ROLES = ("all", "main", "fed")
Party = tuple[ModelSpec, tuple[int, ...]]  # the model of a client's segments, and its cuts


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
    stop: StopWhen  # when the run ends before its last round
    joins: bool = False  # whether all clients take part in each step, see ``Topology``
    parties: tuple[Party, ...] = ()  # of each client, where they differ
    withholds_labels: bool = False  # a client's choice, in schemes without a cut as well
    frozen: frozenset[int] = frozenset()  # segments between the cuts that are not trained, from 0
    tasks: Tasks = NO_TASKS  # of several servers
    server: int = 0  # whose recipe it is, of several servers; 0: the main one

    @property
    def aligns(self) -> bool:
        """Whether clients' own samples are to be aligned by their ids."""
        return self.joins and self.run.partition == OWN

    def leader(self, client: int) -> int:
        """Return the client in whose name a client's steps are drawn and taken, with its labels."""
        return self.run.label_client if self.joins else client

    @property
    def has_hops(self) -> bool:
        return bool(hops_of(self.segments))

    @property
    def has_followers(self) -> bool:
        """Whether other parties than the main server hold segments for all clients."""
        return bool(self.followers)

    def at_server(self, index: int) -> "Recipe":
        """Return the recipe of one of several servers, whose model is drawn apart."""
        drawn = seeds.derive(self.run.seed, seeds.TASK, index) if index else self.run.seed
        weight = self.tasks.weights[index]
        training = replace(self.training, seed=drawn, loss_weight=weight)
        return replace(self, training=training, server=index)

    def in_role(self, role: str) -> "tuple[Holder, Recipe]":
        """Return the party that ``--role`` names, and this recipe as that party has it.

        Raises:
            ConfigError: the run has no such party.
        """
        if role not in (*MAIN_ROLES, *self.followers):
            others = f"; it has {', '.join(self.followers)}" if self.followers else ""
            raise ConfigError(f"--role {role}: {self.title} has no part for it{others}")
        if hop := hop_of(role):
            return hop, self
        names = [f"task:{name}" for name in self.tasks.names]
        return Holder.SERVER, self.at_server(names.index(role)) if role in names else self

    @property
    def followers(self) -> list[str]:
        """The roles of all parties beside the main server that hold segments for all clients."""
        hops = [hop.role for hop in hops_of(self.segments)]
        return hops + [f"task:{name}" for name in self.tasks.names[1:]]

    def at_each_server(self) -> "list[Recipe]":
        """Return the recipe of each server, the main one's first."""
        return [self.at_server(index) for index in range(len(self.tasks.names))] or [self]

    @property
    def caller(self) -> str:
        """The role of those who connect to the server: the clients', or the last hop's."""
        return [Holder.CLIENT, *hops_of(self.segments)][-1].role

    def joins_at(self, holder: Holder) -> bool:
        """Return whether a party joins the activations of all clients: the one behind them."""
        return self.joins and [*self.segments.values()][1] is holder

    def is_told_figures(self, client: int) -> bool:
        """Return whether a client is told the figures of each step: not past a hop that joins."""
        return self.has_labels(client) or self.joins_at(Holder.SERVER)

    def has_labels(self, client: int) -> bool:
        return self.leader(client) == client

    def may_leave(self, client: int) -> bool:
        """Return whether a round can go on without a client: not without the labels of all."""
        return not (self.joins and self.has_labels(client))

    def model_index(self, client: int) -> int:
        """Return the client whose model a client trains: its own, or one for all."""
        return client if self.joins else 0

    def model_seed(self, client: int) -> int:
        """Return the seed of a client's initial weights: one for all that train the same model."""
        seed, is_leader = self.training.seed, self.has_labels(client)
        return seed if is_leader else seeds.derive(seed, seeds.INITIAL_WEIGHTS, client)

    def model_name(self, client: int) -> str:
        """Return the name of the model that a client's segments are of."""
        run = self.run
        return run.party_models.split(",")[client] if run.party_models else run.model

    def party(self, client: int) -> Party:
        """Return the model that a client's segments are of, and its cuts."""
        return self.parties[client] if self.parties else (self.model, self.cuts)

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
        run, own = self.run, self.tasks.names[self.server : self.server + 1]
        cut = f"{run.model} cut at {run.cut}, {run.topology}" if self.is_cut else run.model
        return ", ".join([cut, *(f"task {name}" for name in own)])

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
        _check_parts(run, row, joins=placed.joins)
        tasks = Tasks.of(run, placed, row)
        parties: tuple[Party, ...] = ()
        if placed.joins:
            parties = _parties(run, model, cuts, allowed)
            model, cuts = parties[run.label_client]
            row = replace(row, back_of=shared, fronts=Fronts.OWN)
        keep, stop = _keep(run, row), StopWhen.parse(run.stop_when)
        for name, metric in {"stop_when": stop.metric, "keep_models": keep.best_by}.items():
            if metric:
                named(f"metric of {flag(name)}", metric, training.task.compared)
        recipe = cls(
            run, row, model, cuts, segments, training, rule, keep, stop,
            joins=placed.joins, parties=parties, withholds_labels=withholds_labels,
            frozen=_frozen(run, [*placed.segments(len(cuts))]), tasks=tasks,
        )  # fmt: skip
        recipe = recipe.at_server(0) if tasks.names else recipe
        if recipe.keeps_labels:
            _check_private(recipe)
        if recipe.has_followers:
            _check_followed(recipe)
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


def _frozen(run: RunConfig, segments: Sequence[str]) -> frozenset[int]:
    """Return which segments between the cuts ``--freeze`` names; also in schemes without a cut.

    Raises:
        ConfigError: there is no such segment.
    """
    names = [name.strip() for name in run.freeze.split(",") if name.strip()]
    for name in names:
        wanted = f"some of the segments that --cut {run.cut} makes: {', '.join(segments)}"
        require(name in segments, "freeze", name, wanted)
    return frozenset(map(segments.index, names))


def _check_parts(run: RunConfig, row: Scheme, *, joins: bool) -> None:
    """Check a run's options against whether all clients take part in each step (``joins``).

    Raises:
        ConfigError: one does not fit.
    """
    if not joins:
        wanted = f"another: with --topology {run.topology} each client has samples of its own"
        require(run.partition != VERTICAL, "partition", VERTICAL, wanted)
        for name in ("fusion", "label_client", "party_models"):
            given, default = getattr(run, name), getattr(RunConfig, name)
            require(given == default, name, given, f"left out, with --topology {run.topology}")
        return
    named("fusion", run.fusion, FUSIONS)
    given, clients = run.partition, run.clients
    conditions = [
        (row.exchange is Exchange.CUT and not row.pooled, "scheme", "a scheme with a cut"),
        (given in (VERTICAL, OWN), "partition", f"{VERTICAL} or {OWN}"),
        (run.participation == 1, "participation", "all clients in each step"),
        (run.most_clients == clients, "max_clients", "the number of clients known"),
        (run.label_client < clients, "label_client", f"one of the {counted(clients, 'client')}"),
        (run.batch_size > 1, "batch_size", "2 or more: all clients are told a batch's loss"),
        (
            given == OWN or run.augment in ("", NONE),
            "augment",
            "none: each client would change its part of an image otherwise",
        ),
    ]
    for holds, name, wanted in conditions:
        require(holds, name, getattr(run, name), f"{wanted}, with --topology {run.topology}")


def _parties(
    run: RunConfig, model: ModelSpec, cuts: tuple[int, ...], allowed: Collection[str] | None
) -> tuple[Party, ...]:
    """Return the model of each client's first segment, and its cuts.

    Behind the fronts the leader's model goes on; others' own models are cut once.

    Raises:
        ConfigError: there is not one for each client, one is unknown, or the leader's lacks cuts.
    """
    names = run.party_models.split(",") if run.party_models else [run.model] * run.clients
    if len(names) != run.clients:
        raise ConfigError(
            f"--party-models {run.party_models}: {len(names)} models for {run.clients} clients"
        )
    found = []
    for client, name in enumerate(names):
        spec = model_spec(name, allowed)
        own = parse_cuts(run.cut if spec.cut is None else None, spec.cut, name)
        own = own[: len(cuts) if client == run.label_client else 1]
        found.append((model, cuts) if name == run.model else (spec, own))
    leaders = names[run.label_client]
    if len(found[run.label_client][1]) < len(cuts):
        raise ConfigError(
            f"--party-models {run.party_models}: --topology {run.topology} cuts the model of"
            f" --label-client {run.label_client} {len(cuts)} times: give --model {leaders} and its"
            " --cut"
        )
    return tuple(found)


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
    if run.class_weights == BALANCED:
        raise ConfigError(
            f"--class-weights balanced: with {named} no client tells how many"
            " samples it has of each class; give a weight for each class"
        )
    if run.batch_size == 1:
        raise ConfigError(
            f"--batch-size 1: with {named} the loss of a single sample would be"
            " sent, which may tell its label; give at least 2"
        )


def _check_followed(recipe: Recipe) -> None:
    """Check that hops and further servers can do their part, and that hops are told no labels.

    Raises:
        ConfigError: they cannot, or are.
    """
    run = recipe.run
    conditions = [
        (run.server_order == "fixed", "server_order", "fixed: after a restart of any party, too"),
        (run.weights == SOCKET, "weights", "left out: weights pass over the connections"),
        (run.most_clients == run.clients, "max_clients", "the number of clients known"),
        (
            not (recipe.has_hops and run.class_weights == BALANCED),
            "class_weights",
            "a weight for each class: hops would be told how often each one comes",
        ),
    ]
    for holds, name, wanted in conditions:
        require(holds, name, getattr(run, name), f"{wanted}, with --topology {run.topology}")


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
