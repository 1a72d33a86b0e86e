"""Frozen and tied weights, and frozen BatchNorm, stay what they are in every scheme."""

from collections.abc import Mapping
from itertools import cycle, product
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.model.blocks import Entries
from sfl.model.zoo import build, model_spec
from sfl.nodes import NodeConfig
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.runtime.simulation import simulate
from sfl.strategy.aggregate import RULES
from sfl.strategy.merge import Shared, Trained, merge
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES
from tests.support.launch import Launcher

MODEL = "tests.support.odd_models:frozen"
CUT = 5  # behind the first layer that is trained
SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
START = build(model_spec(MODEL), (1, 28, 28), 10, seed=0)
ENTRIES = Entries.of([START])
MODES = {name: module.training for name, module in START.named_modules()}
# A frozen BatchNorm's buffers, and the weights that came with requires_grad=False.
FIXED = ENTRIES.frozen | {f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}

State = dict[str, torch.Tensor]


def last_models(run: Path) -> State:
    """Return the model after the last round, from its halves, and each client's own front."""
    found: State = {}
    paths = [*run.glob("models/*_model_001.pt"), *run.glob("models/client_?_001.pt")]
    for path in [*paths, *run.parent.parent.glob("client/r/*/models/client_?_001.pt")]:
        state = torch.load(path, weights_only=True)
        found |= {f"{path.parts[-3]}/{path.name}/{name}": t for name, t in state.items()}
    return found


def check_fixed(run: Path, trained: str = "4.weight") -> None:
    """See that what is frozen is as it was built, that the rest moved, and that ties hold."""
    found, start = last_models(run), START.state_dict()
    names = {key.rpartition("/")[2] for key in found}
    assert names == start.keys()
    for key, tensor in found.items():
        name = key.rpartition("/")[2]
        if name in FIXED:
            assert torch.equal(tensor, start[name]), key
        if name == trained:
            assert not torch.equal(tensor, start[name]), key
        if first := ENTRIES.same.get(name):
            assert torch.equal(tensor, found[key.removesuffix(name) + first]), key


def test_the_model_has_something_of_each_kind() -> None:
    assert {"0.weight", "1.weight", "10.weight"} <= ENTRIES.frozen
    assert ENTRIES.same == {"7.weight": "5.weight", "7.bias": "5.bias"}
    assert {"4.weight", "5.weight", "8.weight", "12.weight"} <= ENTRIES.trained
    assert not MODES["1"]
    assert MODES["8"]


OPTIONS = [
    {"weight_decay": 0.1, "clip_norm": 0.1},
    SGD | {"optimizer_state": "keep", "weight_decay": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), list(product(SCHEMES, OPTIONS)))
def test_what_is_frozen_stays_in_every_scheme(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    run = RunConfig(
        scheme=name, model=MODEL, cut=CUT, rounds=2, batch_size=700, run="r",
        partition="sizes:0.2,0.2,0.6", **options,
    )  # fmt: skip
    check_fixed(simulate(run, NodeConfig(out=str(tmp_path))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "name"), list(zip([*RULES, "fedprox"], cycle(["fl", "sflv1"]), strict=False))
)
def test_what_is_frozen_stays_under_every_rule(tmp_path: Path, name: str, rule: str) -> None:
    options: dict[str, object] = {"aggregation": rule} if rule != "fedprox" else {"fedprox_mu": 0.1}
    run = RunConfig(scheme=name, model=MODEL, cut=CUT, rounds=2, batch_size=700, run="r", **options)
    check_fixed(simulate(run, NodeConfig(out=str(tmp_path))))


@pytest.mark.parametrize("rule", RULES)
def test_one_tensor_gets_one_value_from_every_rule(rule: str) -> None:
    """Even if a client were to send two; and nobody moves what is frozen."""
    run = RunConfig(scheme="fl", model=MODEL, cut=CUT, aggregation=rule)
    start, fronts = dict(START.state_dict()), {}
    for k in range(3):
        drawn = torch.Generator().manual_seed(k)
        noise = {n: torch.randn(t.shape, generator=drawn) for n, t in start.items()}
        fronts[k] = {n: (t + noise[n]).to(t.dtype) for n, t in start.items()}
    memory: Mapping[str, torch.Tensor] = {}
    for _ in range(2):
        trained = Trained(
            {k: {"front": front} for k, front in fronts.items()}, {}, dict.fromkeys(fronts, 1), 2
        )
        merged = merge(Recipe.of(run), {"front": Shared(start, memory)}, trained, ENTRIES)["front"]
        state, memory = merged.state, merged.memory
        assert list(state) == list(start)
        for name, first in ENTRIES.same.items():
            assert torch.equal(state[name], state[first])
        for name in ENTRIES.frozen:
            assert torch.equal(state[name], start[name])
        assert not any(name in key for key in memory for name in ENTRIES.same)


def test_a_frozen_back_gives_gradients_to_the_front(tmp_path: Path) -> None:
    model = "tests.support.odd_models:frozen_back"
    for name in ("sflv1", "fl", "sync-sgd"):
        run = RunConfig(
            scheme=name, model=model, cut=3, rounds=1, batch_size=700, run="r", weight_decay=0.1
        )
        path = simulate(run, NodeConfig(out=str(tmp_path / name)))
        start = build(model_spec(model), (1, 28, 28), 10, seed=0).state_dict()
        found: State = {}
        for half in path.glob("models/*_model_000.pt"):
            found |= torch.load(half, weights_only=True)
        moved = {n for n, t in found.items() if not torch.equal(t, start[n])}
        assert {"1.weight", "1.bias"} <= moved
        assert not moved & {"3.weight", "3.bias", "4.weight", "4.bias"}
        assert {n for n in moved if n.startswith("3.")} >= {"3.running_mean"}  # it is in train()


@pytest.mark.slow
@pytest.mark.parametrize(  # a front without, and with, something to train
    ("name", "cut"), [("sflv1", 3), ("sflv1", 4), ("sync-sgd", 4)]
)
def test_a_socket_run_of_a_frozen_model_equals_the_simulation(
    launcher: Launcher, tmp_path: Path, name: str, cut: int
) -> None:
    options = {"scheme": name, "model": MODEL, "cut": cut, "rounds": 2, "batch_size": 700}
    options |= {"weight_decay": 0.1, "optimizer_state": "keep"}
    line = [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]
    run = launcher.run(*line, client_options=["--allow-import", MODEL])
    one_process = simulate(RunConfig(run="r", **options), NodeConfig(out=str(tmp_path / "one")))
    ours, theirs = last_models(run), last_models(one_process)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    check_fixed(run)
    report = replay.check(load(run))
    assert report.findings == []


def test_a_model_that_came_in_eval_is_warned_about(tmp_path: Path) -> None:
    for name, warned in (("all_in_eval", True), ("frozen", False)):
        run = RunConfig(
            model=f"tests.support.odd_models:{name}", cut=3, rounds=1, batch_size=700, run=name
        )
        path = simulate(run, NodeConfig(out=str(tmp_path)))
        assert ("the model came in eval()" in (path / "server_log.txt").read_text()) == warned
