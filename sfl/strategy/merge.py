"""Merging the segments that a round has trained, and their files in a run's folder.

The server merges after each round; replay repeats it. Each segment is merged separately: in
SplitFed the fed server has only the clients' segments, and the main server only its own.
"""

import contextlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count

import torch

from sfl.archive.layout import MEMORY, SHARED_MODEL, names_of, segment_path
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError, counted
from sfl.files.torch_file import StateSpec, TensorSpec, are_finite, encode_state
from sfl.model.blocks import Entries
from sfl.model.topology import Holder, States
from sfl.strategy.aggregate import State, Update
from sfl.strategy.order import num_drawn
from sfl.strategy.ranks import OneRank, Ranks
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange, Fronts
from sfl.strategy.split_model import SplitModel


def averaging_weights(run: RunConfig, num_samples: Mapping[int, int]) -> dict[int, int]:
    """Return each client's weight in an average: its training samples, or 1."""
    equal = run.aggregation_weights == "equal"
    return {client: 1 if equal else count for client, count in num_samples.items()}


def averages_backs(recipe: Recipe) -> bool:
    """Return whether the scheme has several copies of the back, which are averaged."""
    row = recipe.scheme
    return row.exchange is Exchange.CUT and len(row.backs_of(range(recipe.run.most_clients))) > 1


def fewest_clients(recipe: Recipe) -> int:
    """Return the fewest clients with which a round can end, whichever they are.

    The run's aggregation rule must accept as many models as a segment then has: one of each client,
    and of the back the fewest copies that so many clients can share.

    Raises:
        ConfigError: the rule does not accept its options or as few models as a round may have, or
            the scheme averages no models.
    """
    run, row = recipe.run, recipe.scheme
    averages_fronts = row.fronts is Fronts.AVERAGED
    averages_models = averages_fronts or averages_backs(recipe)
    if run.aggregation != "fedavg" and (
        not averages_models or row.exchange is Exchange.WEIGHT_GRADS or row.pooled
    ):
        raise ConfigError(
            f"--aggregation {run.aggregation}: --scheme {run.scheme} averages no trained models"
        )
    drawn, fewest = num_drawn(run, run.clients), 1
    if averages_fronts:
        fewest = _fewest_models(recipe, drawn, f"the models of {counted(drawn, 'client')}")
    if averages_backs(recipe):
        # of_copies[n]: the most clients that n copies of the back serve
        sizes = Counter(map(row.back_of, range(run.most_clients))).values()
        of_copies = [0, *accumulate(sorted(sizes, reverse=True))]
        copies = bisect_left(of_copies, drawn)
        shown = "1 copy" if copies == 1 else f"{copies} copies"
        models = _fewest_models(recipe, copies, f"{shown} of the back")
        fewest = max(fewest, of_copies[models - 1] + 1)
    return fewest


def _fewest_models(recipe: Recipe, most: int, these: str) -> int:
    """Return the fewest models that the run's rule accepts, at most ``most``: ``these``."""
    one = {"w": torch.zeros(1)}

    def try_rule(count: int) -> None:
        recipe.rule(Update([one] * count, [1] * count, start=one, trained={"w"}))

    def is_accepted(count: int) -> bool:
        with contextlib.suppress(ConfigError):
            try_rule(count)
            return True
        return False

    counts = range(1, most + 1)
    at = bisect_left(counts, True, key=is_accepted)
    if at == most:
        try:
            try_rule(most)
        except ConfigError as error:
            raise ConfigError(f"{error}; --scheme {recipe.run.scheme} averages {these}") from error
    return counts[at]


def fewest_connected(recipe: Recipe) -> int:
    """Return the fewest clients of which a round draws ``fewest_clients``."""
    needed = fewest_clients(recipe)
    return next(n for n in count(needed) if num_drawn(recipe.run, n) >= needed)


@dataclass(frozen=True)
class Shared:
    """A merged segment, from which the next round starts: its weights, and the rule's memory."""

    state: State
    memory: State = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The states that a round has trained."""

    by_client: Mapping[int, States]  # clients' segments, of the clients in the round
    by_copy: Mapping[int, States]  # the server's or a hop's segments, of each copy
    weights: Mapping[int, int]  # of the clients in averages
    last: int  # the client whose turn was last
    ranks: Ranks = field(default_factory=OneRank)  # which have trained the other clients' states


def shared_files(name: str, shared: Shared, round_index: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield kind, path and content of the files of a merged segment."""
    path = segment_path(SHARED_MODEL, name, round_index)
    yield names_of(name)[0], path, encode_state(shared.state)
    if shared.memory:
        path = segment_path(MEMORY, name, round_index)
        yield "aggregation", path, encode_state(shared.memory)


def merge(
    recipe: Recipe, start: Mapping[str, Shared], trained: Trained, entries: Entries
) -> dict[str, Shared]:
    """Return the merged segments of those in ``start``, except for ones that clients keep."""
    merged = {}
    for name, shared in start.items():
        of_clients = recipe.segments[name] is Holder.CLIENT
        theirs = trained.by_client if of_clients else trained.by_copy
        states = {k: states[name] for k, states in theirs.items() if name in states}
        merge_one = _merge_clients if of_clients else _merge_copies
        merged[name] = merge_one(recipe, states, trained, shared, entries)
    return {name: shared for name, shared in merged.items() if shared is not None}


def _merge_clients(
    recipe: Recipe, states: Mapping[int, State], trained: Trained, start: Shared, entries: Entries
) -> Shared | None:
    """Return the merged segment of the clients; None where each client keeps its own."""
    policy = recipe.scheme.fronts
    if policy is Fronts.OWN:
        return None
    if policy is Fronts.RELAYED:
        return Shared(states[trained.last])
    return _aggregate(recipe, states, trained.weights, start, entries, trained.ranks)


def _merge_copies(
    recipe: Recipe, states: Mapping[int, State], trained: Trained, start: Shared, entries: Entries
) -> Shared:
    """Return the merged segment of the server, or of a hop.

    The weight of each copy is the sum over its clients; copies without clients are left out.
    """
    back_of = recipe.scheme.back_of
    served = {b: sum(w for k, w in trained.weights.items() if back_of(k) == b) for b in states}
    used = {b: states[b] for b in sorted(states) if served[b]}
    if averages_backs(recipe):
        return _aggregate(recipe, used, served, start, entries, trained.ranks)
    (only,) = used.values()
    return Shared(only)


def _aggregate(
    recipe: Recipe,
    states: Mapping[int, State],
    weights: Mapping[int, int],
    start: Shared,
    entries: Entries,
    ranks: Ranks,
) -> Shared:
    chosen = sorted(states)
    began = {n: entry for n, entry in start.state.items() if n not in entries.frozen}
    update = Update(
        [{n: states[k][n] for n in began} for k in chosen],
        [weights[k] for k in chosen],
        start=began,
        trained=sorted(entries.trained & start.state.keys()),
        memory=start.memory,
        pass_on=ranks.pass_on,
    )
    new, memory = recipe.rule(update)
    buffers = [name for name in began if name not in entries.trained]
    changed = ranks.gather(
        {k: [n for n in buffers if not torch.equal(states[k][n], began[n])] for k in chosen}
    )
    new |= {name: began[name] for name in set(buffers).difference(*changed.values())}
    state = {n: new.get(n, start.state[n]) for n in start.state if n not in entries.same}
    return Shared({n: state[entries.same.get(n, n)] for n in start.state}, memory)


def memory_spec(recipe: Recipe, weights: StateSpec, entries: Entries) -> StateSpec:
    """Return the spec of the run's rule's memory for a segment; empty for most rules."""
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in weights.items()}
    clients = range(num_drawn(recipe.run, recipe.run.clients))
    merged = _aggregate(
        recipe, dict.fromkeys(clients, state), dict.fromkeys(clients, 1), Shared(state), entries,
        OneRank(),
    )  # fmt: skip
    return {name: TensorSpec.of(tensor) for name, tensor in merged.memory.items()}


def has_client_state(recipe: Recipe) -> bool:
    """Return whether rounds start from state that exists at each client only."""
    return recipe.scheme.fronts is Fronts.OWN or recipe.training.keeps_optimizer


def check_merged(made: Mapping[str, Shared], split: SplitModel, round_index: int) -> None:
    """Check that merged weights are finite.

    Raises:
        RunError: they are not, and no single client caused it.
    """
    for name, shared in made.items():
        if not are_finite(split.changing(shared.state)):
            raise RunError(
                f"the weights of the {name} hold NaN, infinity, or numbers whose squares"
                f" overflow after round {round_index + 1}: a lower --lr or --clip-norm may help"
            )
