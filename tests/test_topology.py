"""Segments by name: a further cut gives a further name, and nothing else changes."""

import re
from typing import Any

import pytest
import torch

from sfl.archive.layout import (
    CLIENT_OPTIMIZER,
    MEMORY,
    ONE_CLIENT_MODEL,
    SERVER_OPTIMIZER,
    SHARED_MODEL,
    segment_path,
)
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.blocks import Entries
from sfl.model.topology import TOPOLOGIES, Holder, Segments, Stop, Topology, joined, route
from sfl.strategy.merge import Shared, Trained, merge, shared_files
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel

CPU = torch.device("cpu")
HEAD = "client_head"
SEGMENTS = TOPOLOGIES["u-shaped"].segments(2)


def test_every_cut_gives_a_segment_with_a_name_and_files_of_its_own() -> None:
    """Holders take turns; the first segment of each party has the name that it always had."""
    segments = TOPOLOGIES["alternating"].segments(5)
    names = ["front", "back", "client_head", "server_tail", "client_segment_4", "server_segment_5"]
    assert list(segments) == names
    assert list(segments.values()) == [Holder.CLIENT, Holder.SERVER] * 3
    assert list(TOPOLOGIES["u-shaped"].segments(2)) == names[:3]
    shared = [segment_path(SHARED_MODEL, name, 3) for name in names[:3]]
    assert shared == [f"models/{n}_003.pt" for n in ("client_model", "server_model", "client_head")]
    own = [segment_path(ONE_CLIENT_MODEL, name, 3, client=1) for name in (names[0], names[2])]
    assert own == ["models/client_1_003.pt", "models/client_1_head_003.pt"]
    assert segment_path(SERVER_OPTIMIZER, "back", -1, back=2) == "models/server_optimizer_2_init.pt"
    paths = [segment_path(kind, n, 3) for kind in (SHARED_MODEL, MEMORY) for n in names]
    paths += [
        segment_path(kind, name, 3, client=4, back=4)
        for name, holder in segments.items()
        for kind in {
            Holder.CLIENT: (ONE_CLIENT_MODEL, CLIENT_OPTIMIZER), Holder.SERVER: (SERVER_OPTIMIZER,)
        }[holder]
    ]  # fmt: skip
    assert len(set(paths)) == len(paths) == 21


def test_each_party_takes_what_is_elsewhere_and_gives_what_is_wanted_there() -> None:
    segments = TOPOLOGIES["u-shaped"].segments(2)
    front, head = route(segments, Holder.CLIENT)
    assert front == Stop("front", takes=None, gives=0, is_last=False)
    assert head == Stop("client_head", takes=1, gives=None, is_last=True)
    assert route(segments, Holder.SERVER) == (Stop("back", takes=0, gives=1, is_last=False),)


def test_two_segments_of_one_party_have_no_link_between_them() -> None:
    row = Topology("", lambda _: [Holder.CLIENT, Holder.SERVER, Holder.SERVER], range(2, 3))
    back, tail = route(row.segments(2), Holder.SERVER)
    assert (back.takes, back.gives, tail.takes, tail.gives) == (0, None, None, None)


@pytest.mark.parametrize(
    ("cut", "topology", "wanted"),
    [(None, "", "vanilla"), (3, "", "vanilla"), ("3", "", "vanilla"), ("2,4", "", "u-shaped"),
     ("2,4,5", "", "alternating"), (3, "alternating", "alternating")],
)  # fmt: skip
def test_the_topology_is_that_of_the_number_of_cuts(
    cut: int | str | None, topology: str, wanted: str
) -> None:
    recipe = Recipe.of(RunConfig(cut=cut, topology=topology))
    assert recipe.run.topology == wanted
    assert Recipe.of(recipe.run).segments == recipe.segments


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cut": "4,2"}, "numbers of blocks that rise"),
        ({"cut": "2,2"}, "numbers of blocks that rise"),
        ({"cut": "2,"}, "numbers of blocks that rise"),
        ({"cut": "-1,2"}, "numbers of blocks that rise"),
        ({"cut": "2,4", "topology": "vanilla"}, "vanilla takes 1 cut; --cut 2,4 has 2"),
        ({"topology": "u-shaped"}, "u-shaped takes 2 cuts"),
        ({"topology": "square"}, "unknown topology 'square'"),
        ({"cut": "2,4", "class_weights": "balanced"}, "no client tells how many samples"),
        ({"cut": "2,4", "batch_size": 1}, "the loss of a single sample"),
    ],
)
def test_what_a_topology_cannot_do_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        Recipe.of(RunConfig(**options))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cut": 2}, "the server runs --topology vanilla with --cut 2, which sends it the labels"),
        ({"cut": "2,4,6"}, "--topology alternating with --cut 2,4,6"),
        (
            {},
            "u-shaped (2 cuts) or alternating (2 cuts) or u-shaped-hop (3 cuts), or --scheme fl or",
        ),
        ({"scheme": "fl", "class_weights": "balanced"}, "with --keep-labels no client tells how"),
        ({"scheme": "sync-sgd", "batch_size": 1}, "with --keep-labels the loss of a single sample"),
    ],
)
def test_a_client_that_withholds_its_labels_refuses_what_would_tell_them(
    options: dict[str, Any], why: str
) -> None:
    Recipe.of(RunConfig(**options))
    with pytest.raises(ConfigError, match=re.escape(why)):
        Recipe.of(RunConfig(**options), withholds_labels=True)


def test_who_holds_what() -> None:
    """Without a cut each party that computes has the whole model."""
    for scheme, client, server in (("sflv1", ["front"], ["back"]), ("fl", ["front"], ["front"])):
        split = SplitModel(Recipe.of(RunConfig(scheme=scheme, model="mlp")), (1, 28, 28), 10)
        assert split.held_by(Holder.CLIENT) == client
        assert list(split.segments(Holder.SERVER, CPU)) == server
        assert split.by_segment(split.front_state()).keys() == {"front"}


def test_a_third_segment_is_merged_and_written_like_the_others() -> None:
    """Clients hold the first and the last, the server has a copy of the middle for each."""

    def state(name: str, value: float) -> dict[str, torch.Tensor]:
        return {f"{name}.w": torch.tensor([float(value)])}

    start = {name: Shared(state(name, 0.0)) for name in SEGMENTS}
    by_client = {k: {n: state(n, k + 10 * (n == HEAD)) for n in ("front", HEAD)} for k in (0, 2)}
    by_copy = {k: {"back": state("back", k + 0.5)} for k in (0, 1, 2)}
    trained = Trained(by_client, by_copy, {0: 1, 2: 3}, last=2)
    entries = Entries(frozenset(f"{n}.w" for n in SEGMENTS))
    recipe = Recipe.of(RunConfig(scheme="sflv1", clients=3, cut="2,6"))
    merged = merge(recipe, start, trained, entries)
    found = {name: float(shared.state[f"{name}.w"]) for name, shared in merged.items()}
    assert found == {"front": 1.5, "back": 2.0, HEAD: 11.5}
    files = [path for item in merged.items() for _, path, _ in shared_files(*item, 0)]
    assert files == [f"models/{n}_000.pt" for n in ("client_model", "server_model", "client_head")]
    own = merge(Recipe.of(RunConfig(scheme="sflv3", clients=3, cut="2,6")), start, trained, entries)
    assert list(own) == ["back"]  # each client keeps its own


def test_segments_are_saved_and_restored_together() -> None:
    split = SplitModel(Recipe.of(RunConfig(model="mlp")), (1, 28, 28), 10)
    ours = Segments(split.segments(Holder.CLIENT, CPU) | split.segments(Holder.SERVER, CPU))
    before, snapshot = joined(ours.states()), ours.snapshot()
    ours.load({n: {k: torch.zeros_like(t) for k, t in s.items()} for n, s in ours.states().items()})
    assert not any(tensor.any() for tensor in joined(ours.states()).values())
    ours.restore(snapshot)
    assert all(torch.equal(t, before[name]) for name, t in joined(ours.states()).items())
    assert (ours.first, ours.last) == (ours["front"], ours["back"])
