"""What a round's trained halves become, and where they lie in a run's folder.

The server's rounds compute it, and replay computes it again. Each half is aggregated on its own: in
SplitFed the fed server knows the fronts and the main server the backs, and neither the other's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sfl.archive.layout import CLIENT_MODEL, MEMORY, SERVER_MODEL, model_path
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.files.torch_file import StateSpec, TensorSpec, encode_state
from sfl.model.blocks import Entries
from sfl.strategy.aggregate import State, Update
from sfl.strategy.order import draw
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange, Fronts

FRONT, BACK = "front", "back"  # the halves


def averaging_weights(run: RunConfig, num_samples: Mapping[int, int]) -> dict[int, int]:
    """Return each client's weight in an average: its training samples, or 1."""
    equal = run.aggregation_weights == "equal"
    return {client: 1 if equal else count for client, count in num_samples.items()}


def has_back_files(recipe: Recipe) -> bool:
    """Say whether the server has a model of its own, apart from the clients'."""
    return recipe.scheme.exchange is Exchange.CUT


def averages_backs(recipe: Recipe) -> bool:
    """Say whether the scheme makes copies of the back."""
    copies = {recipe.scheme.back_of(k) for k in range(recipe.run.most_clients)}
    return has_back_files(recipe) and len(copies) > 1


def check_rule(recipe: Recipe) -> None:
    """Try the run's aggregation rule on as many models as there are of each half in a round.

    Raises:
        ConfigError: it does not take such values or so few models, or the scheme averages none.
    """
    run, row = recipe.run, recipe.scheme
    drawn = draw(run, range(run.clients), 0)
    counts = [len(drawn)] if row.fronts is Fronts.AVERAGED else []
    counts += [len({row.back_of(k) for k in drawn})] if averages_backs(recipe) else []
    one = {"w": torch.zeros(1)}
    for count in counts or [3]:
        recipe.rule(Update([one] * count, [1] * count, start=one, trained={"w"}))
    averages_models = counts and row.exchange is not Exchange.WEIGHT_GRADS and not row.pooled
    if run.aggregation != "fedavg" and not averages_models:
        raise ConfigError(
            f"--aggregation {run.aggregation}: --scheme {run.scheme} averages no trained models"
        )


@dataclass(frozen=True)
class Half:
    """One half of the model at the end of a round: its weights, and the rule's memory."""

    state: State
    memory: State


def half_files(name: str, half: Half, round_index: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield what is written of a half that everyone goes on from: kind, path and content."""
    kind, template = {
        FRONT: ("client_model", CLIENT_MODEL),
        BACK: ("server_model", SERVER_MODEL),
    }[name]
    yield kind, model_path(template, round_index), encode_state(half.state)
    if half.memory:
        path = model_path(MEMORY, round_index, half=name)
        yield "aggregation", path, encode_state(half.memory)


def merge_fronts(
    recipe: Recipe,
    fronts: Mapping[int, State],
    weights: Mapping[int, int],
    *,
    start: Half,
    entries: Entries,
    last: int,
) -> Half | None:
    """Return the front from which everyone goes on; None where each client keeps its own.

    ``fronts`` are those of the clients that took part, ``last`` is whose turn was last.
    """
    policy = recipe.scheme.fronts
    if policy is Fronts.OWN:
        return None
    if policy is Fronts.RELAYED:
        return Half(fronts[last], {})
    return _aggregate(recipe, fronts, weights, start, entries)


def merge_backs(
    recipe: Recipe,
    backs: Mapping[int, State],
    weights: Mapping[int, int],
    *,
    start: Half,
    entries: Entries,
) -> Half:
    """Return the back from which all copies go on.

    ``weights`` are those of the clients that took part; each copy weighs as much as the clients
    that it served, and a copy that served none is left out.
    """
    back_of = recipe.scheme.back_of
    served = {b: sum(w for k, w in weights.items() if back_of(k) == b) for b in backs}
    used = {b: backs[b] for b in sorted(backs) if served[b]}
    if averages_backs(recipe):
        return _aggregate(recipe, used, served, start, entries)
    (only,) = used.values()
    return Half(only, {})


def _aggregate(
    recipe: Recipe,
    states: Mapping[int, State],
    weights: Mapping[int, int],
    start: Half,
    entries: Entries,
) -> Half:
    chosen = sorted(states)
    merged = [name for name in start.state if name not in entries.frozen]
    update = Update(
        [{n: states[k][n] for n in merged} for k in chosen],
        [weights[k] for k in chosen],
        start=start.state,
        trained=sorted(entries.trained & start.state.keys()),
        memory=start.memory,
    )
    new, memory = recipe.rule(update)
    for name in merged:
        theirs = [state[name] for state in update.states]
        if name not in entries.trained and all(torch.equal(t, start.state[name]) for t in theirs):
            new[name] = start.state[name]
    state = {n: new.get(n, start.state[n]) for n in start.state if n not in entries.same}
    return Half({n: state[entries.same.get(n, n)] for n in start.state}, memory)


def memory_spec(recipe: Recipe, half: StateSpec, entries: Entries) -> StateSpec:
    """Return the spec of the memory that the run's rule keeps of a half; empty if it keeps none."""
    state = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in half.items()}
    count = len(draw(recipe.run, range(recipe.run.clients), 0))
    merged = _aggregate(
        recipe, dict.fromkeys(range(count), state), dict.fromkeys(range(count), 1), Half(state, {}),
        entries,
    )  # fmt: skip
    return {name: TensorSpec.of(tensor) for name, tensor in merged.memory.items()}


def has_own(recipe: Recipe) -> bool:
    """Say whether clients have something that a round starts from and nobody else has."""
    return recipe.scheme.fronts is Fronts.OWN or recipe.training.keeps_optimizer
