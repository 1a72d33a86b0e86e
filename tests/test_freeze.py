"""``--freeze``: segments that are not trained keep weights and buffers, and the rest trains."""

from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.zoo import build, model_spec
from sfl.nodes import NodeConfig
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES
from sfl.strategy.split_model import SplitModel
from tests.support.launch import Launcher
from tests.support.pairwise import pairwise
from tests.support.runs import ALLOW, BN_DROPOUT, RUN
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal, assert_same, joined

START = build(model_spec(BN_DROPOUT), (1, 28, 28), 10, seed=0)  # BatchNorm in each segment
NAMES = set(START.state_dict())
CUT, CUTS = 6, "3,9"
BLOCKS: dict[tuple[str, int | str], slice] = {
    ("front", CUT): slice(0, 6),
    ("back", CUT): slice(6, None),
    ("front", CUTS): slice(0, 3),
    ("back", CUTS): slice(3, 9),
    ("client_head", CUTS): slice(9, None),
}
PLACES = [("front", CUT), ("back", CUTS), ("client_head", CUTS)]


def left_alone(run: Path, last: int = 1) -> set[str]:
    """Return the names of what no party's weights have moved since before the first round."""
    own = [*run.glob("models/client_?_*.pt"), *run.parent.parent.glob("client/*/*/models/*.pt")]
    files = [path for path in own if path.name.endswith(f"_{last:03d}.pt")]
    found = [torch.load(file, weights_only=True) for file in files if "optim" not in file.name]
    found.append(joined(run, last))
    assert {name for state in found for name in state} == NAMES
    start = START.state_dict()
    return NAMES - {n for state in found for n, t in state.items() if not torch.equal(t, start[n])}


def names_in(segment: str, cut: int | str) -> set[str]:
    return set(START[BLOCKS[segment, cut]].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "place", "state"), pairwise(SCHEMES, PLACES, ["reset", "keep"]))
def test_what_is_frozen_stays_and_the_rest_is_trained(
    tmp_path: Path, scheme: str, place: tuple[str, int | str], state: str
) -> None:
    frozen, cut = place
    run = simulated(
        tmp_path, scheme=scheme, model=BN_DROPOUT, cut=cut, freeze=frozen, optimizer_state=state,
        batch_size=200, weight_decay=0.1, clip_norm=0.5, keep_tensors="all",
    )  # fmt: skip
    assert left_alone(run) == names_in(*place)
    assert replay.check(load(run)).findings == []


@pytest.mark.parametrize(("frozen", "cut"), PLACES)
def test_a_rule_with_steps_of_its_own_leaves_it_alone_too(
    tmp_path: Path, frozen: str, cut: int | str
) -> None:
    rule = {"scheme": "sflv1", "aggregation": "fedadam:lr=0.03"}
    run = simulated(tmp_path, model=BN_DROPOUT, cut=cut, freeze=frozen, batch_size=200, **rule)
    assert left_alone(run) == names_in(frozen, cut)


def test_one_client_with_a_frozen_front_equals_central_training(tmp_path: Path) -> None:
    """So a segment is frozen alike where the model is not cut."""
    options = {"model": BN_DROPOUT, "cut": CUT, "freeze": "front", "clients": 1}
    cut = simulated(tmp_path / "cut", scheme="sl", **options)
    whole = simulated(tmp_path / "whole", scheme="central", **options)
    assert_equal(joined(cut), joined(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "frozen"), [("sflv1", "front"), ("sl", "back"), ("fl", "front"), ("sflv3", "front")]
)
def test_a_socket_run_with_a_frozen_segment_equals_the_simulation(
    launcher: Launcher, tmp_path: Path, scheme: str, frozen: str
) -> None:
    options = RUN | {"scheme": scheme, "freeze": frozen, "rounds": 2}
    line = [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]
    sockets = launcher.run(*line, client_options=ALLOW)
    one_process = simulate(RunConfig(**options), NodeConfig(out=str(tmp_path / "one")))
    assert_equal(all_weights(sockets), all_weights(one_process))
    assert_same(sockets, one_process)
    assert left_alone(sockets) == names_in(frozen, CUT)


@pytest.mark.parametrize("frozen", ["front", "back"])
def test_a_segment_of_a_vertical_run_stays_with_its_fusion(tmp_path: Path, frozen: str) -> None:
    run = simulated(
        tmp_path, topology="vertical", partition="vertical", model="mlp", clients=2, freeze=frozen
    )
    held = {"back": [joined(run, last) for last in (-1, 1)]}
    for k in (0, 1):
        own = tmp_path / f"client/r/client_{k}"
        held[f"front of client_{k}"] = [joined(own, last, f"client_{k}") for last in (0, 1)]
    assert "fusion.projection.weight" in held["back"][0]
    for title, (first, last) in held.items():
        assert first
        stays = {name: torch.equal(first[name], last[name]) for name in first}
        assert set(stays.values()) == {title.startswith(frozen)}, title


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("frnt", "--freeze frnt: must be some of the segments that --cut 6 makes: front, back"),
        ("front,back", "--freeze front,back: leaves nothing of the model to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        SplitModel(Recipe.of(RunConfig(model=BN_DROPOUT, cut=6, freeze=freeze)), (1, 28, 28), 10)
    assert str(error.value) == said
