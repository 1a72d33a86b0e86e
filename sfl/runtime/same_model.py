"""Check that a client has built the same model as the server, from its own code."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from sfl import __version__
from sfl.config import RunConfig
from sfl.conversation.join import Joined
from sfl.conversation.party import TRAIN
from sfl.conversation.report import DataReport
from sfl.data.client_data import ClientData
from sfl.environment import differences
from sfl.errors import DataError, RunError
from sfl.model.structure import difference, weights_checksum
from sfl.strategy.merge import Shared
from sfl.strategy.ranks import Ranks
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.strategy.start_check import needs_several_samples

# Limits on models that the server builds from unconfirmed reports while clients register: how many,
# and for how large samples. Other models are compared when all clients are ready.
MOST_BUILT, MOST_ELEMENTS = 4, 2**18
BuiltModel = tuple[Sequence[str], Sequence[str]]  # a model's digests, and the names of its blocks


def report_of(data: ClientData, split: SplitModel, *, shares_figures: bool) -> DataReport:
    """Return a client's report of its data and of the model that it has built for them.

    ``shares_figures``: as in ``DataReport.of``.

    Raises:
        DataError: the loss of a step would be a single sample's, though labels are to stay here.
    """
    recipe = split.recipe
    if recipe.keeps_labels and len(data.train) == 1:
        raise DataError(
            "a single training sample: its loss would be sent, which may tell its label"
        )
    return dataclasses.replace(
        DataReport.of(
            data,
            recipe.run,
            keeps_labels=recipe.keeps_labels,
            shares_figures=shares_figures,
            passes_hops=recipe.has_hops,
        ),
        structure=split.structure,
        weights=weights_checksum(split.front_state()),
    )


class ServersModel:
    """The server's models, built for the shapes and classes that clients report."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._built: dict[tuple[tuple[int, ...], int, int], BuiltModel | None] = {}

    def why_different(self, joined: Joined, *, all_are_there: bool = False) -> str:
        """Return how a client's model differs; "" if it does not, or cannot be checked yet."""
        built = self._built_for(joined, limited=not all_are_there)
        return _why_different(self._recipe.run, built, joined) if built else ""

    def why_too_few_samples(self, joined: Joined) -> str:
        """Return why the model cannot be trained on a single sample; "" if it can."""
        data = joined.data
        if data.num_samples[TRAIN] > 1 or not self._built_for(joined):
            return ""
        split = _model_for(self._recipe, joined)
        why = needs_several_samples(split)
        return f"it has one training sample, and the model needs more: {why}" if why else ""

    def _built_for(self, joined: Joined, *, limited: bool = True) -> BuiltModel | None:
        data, client = joined.data, self._recipe.model_index(joined.client)
        known = data.input_shape, len(data.classes), client
        if known not in self._built:
            too_large = math.prod(data.input_shape) > MOST_ELEMENTS
            if limited and (len(self._built) >= MOST_BUILT or too_large):
                return None
            try:
                split = _model_for(self._recipe, joined)
                self._built[known] = split.structure, split.block_names
            except Exception:  # noqa: BLE001 - a user's own code; reported when all are ready
                self._built[known] = None
        return self._built[known]


def _model_for(recipe: Recipe, joined: Joined) -> SplitModel:
    data = joined.data
    return SplitModel(recipe, data.input_shape, len(data.classes), client=joined.client)


def _why_different(run: RunConfig, built: BuiltModel, joined: Joined) -> str:
    structure, names = built
    found = difference(structure, joined.data.structure, names)
    if not found:
        return ""
    return (
        f"client_{joined.client} builds another model for --model {run.model} than the server:"
        f" {found}; the client runs SFL {joined.fingerprint['sfl']}, the server {__version__}: have"
        " the same release, and the same code of your own, on every machine"
    )


def check_same_start(
    shared: Mapping[str, Shared],
    fingerprint: Mapping[str, str],
    ranks: Ranks,
    *,
    ours: Sequence[int],
    say: Callable[[str], None],
) -> None:
    """Check that all ranks of a server start from the same weights; warn of other machines.

    ``ours``: the clients of this rank.

    Raises:
        RunError: they start from different ones.
    """
    own = {name: weights_checksum(weights.state) for name, weights in shared.items()}
    mine, *others = ranks.gather({ours[0]: [own, dict(fingerprint)]}).items()
    first, (weights, known) = mine
    for client, (theirs, their_fingerprint) in others:
        if theirs != weights:
            raise RunError(
                f"the server's process with client_{client} starts from other weights than that"
                f" with client_{first}: give all the same --init, and one version of torch"
            )
        for found in differences(known, their_fingerprint):
            say(
                f"warning: the server's process with client_{client} has {found} of that with"
                f" client_{first}: the last bit may differ from that of one process"
            )


def check_same_model(
    split: SplitModel, joined: Mapping[int, Joined], say: Callable[[str], None]
) -> None:
    """Check that all clients have built the server's model; warn if initial weights differ.

    Raises:
        RunError: a client has built another model.
    """
    own_front = "it keeps them, and on another machine the run would have other ones"
    starts = own_front if split.recipe.joins else "it starts from the server's"
    for k, client in joined.items():
        if not client.data.structure:  # a client of a simulation
            continue
        own = split.of_party(k)
        ours = weights_checksum(own.front_state())
        if why := _why_different(split.recipe.run, (own.structure, own.block_names), client):
            raise RunError(why)
        if client.data.weights != ours:
            say(
                f"warning: client_{k} draws other initial weights than the server, as other"
                f" processors and versions of torch do: {starts}"
            )
