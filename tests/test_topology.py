"""Segments by name: a further cut gives a further name, and nothing else changes."""

import torch

from sfl.archive.layout import ONE_CLIENT_MODEL, SEGMENT_NAMES, SERVER_OPTIMIZER, segment_path
from sfl.config import RunConfig
from sfl.model.blocks import Entries
from sfl.model.topology import HOLDERS, Holder, Segments, joined, segment_names
from sfl.strategy.merge import Shared, Trained, merge, shared_files
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel

CPU = torch.device("cpu")


def test_every_cut_gives_a_segment_with_a_name_and_files_of_its_own() -> None:
    assert [segment_names(cuts) for cuts in range(3)] == [
        ("front",), ("front", "back"), ("front", "back", "head"),
    ]  # fmt: skip
    assert SEGMENT_NAMES.keys() == HOLDERS.keys()
    paths = [segment_path(ONE_CLIENT_MODEL, name, 3, client=1) for name in ("front", "head")]
    assert paths == ["models/client_1_003.pt", "models/client_1_head_003.pt"]
    assert segment_path(SERVER_OPTIMIZER, "back", -1, back=2) == "models/server_optimizer_2_init.pt"


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

    start = {name: Shared(state(name, 0.0)) for name in HOLDERS}
    by_client = {
        k: {n: state(n, k + 10 * (n == "head")) for n in ("front", "head")} for k in (0, 2)
    }
    by_copy = {k: {"back": state("back", k + 0.5)} for k in (0, 1, 2)}
    trained = Trained(by_client, by_copy, {0: 1, 2: 3}, last=2)
    entries = Entries(frozenset(f"{n}.w" for n in HOLDERS))
    recipe = Recipe.of(RunConfig(scheme="sflv1", clients=3))
    merged = merge(recipe, start, trained, entries)
    found = {name: float(shared.state[f"{name}.w"]) for name, shared in merged.items()}
    assert found == {"front": 1.5, "back": 2.0, "head": 11.5}
    files = [path for item in merged.items() for _, path, _ in shared_files(*item, 0)]
    assert files == [f"models/{n}_000.pt" for n in ("client_model", "server_model", "client_head")]
    own = merge(Recipe.of(RunConfig(scheme="sflv3", clients=3)), start, trained, entries)
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
