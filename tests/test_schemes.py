"""Every scheme computes what its paper says, over sockets as in one process, bit for bit."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from sfl.archive import reader as archive
from sfl.config import RunConfig
from sfl.data.client_data import batch_indices
from sfl.errors import ConfigError
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.strategy import schemes
from sfl.strategy.order import draw, interleaved
from sfl.strategy.schemes import SCHEMES, Scheme
from tests.support.launch import Launcher
from tests.support.pairwise import pairwise
from tests.support.plain_split import Plain
from tests.support.plain_training import data_of, ordinary_training
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import CUT, DEFAULTS, simulated_bn_dropout
from tests.support.weights import all_weights, assert_equal, joined

UNEQUAL = {"partition": "sizes:0.2,0.2,0.6"}
OVER_SOCKETS = [name for name, row in SCHEMES.items() if not row.pooled]


def num_steps(run: Path) -> int:
    """Return the number of steps that all clients together took."""
    tables = [read(path) for path in run.glob("rounds/*.csv")]
    return sum(row["metric"] == "loss" for rows in tables for row in rows)


def read(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "participation", "state"), pairwise(OVER_SOCKETS, [1.0, 0.6], ["reset", "keep"])
)
def test_a_socket_run_equals_the_simulation(
    launcher: Launcher, tmp_path: Path, name: str, participation: float, state: str
) -> None:
    options = {"scheme": name, "participation": participation, "optimizer_state": state}
    options |= {"batch_size": 64, "rounds": 3}
    line = [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]
    line += ["--model", BN_DROPOUT, "--cut", CUT]
    run = launcher.run(*line, client_options=["--allow-import", BN_DROPOUT])
    one_process = simulated_bn_dropout(tmp_path / "simulated", **options)
    assert_equal(all_weights(run), all_weights(one_process))
    assert num_steps(run) == num_steps(one_process) >= 100
    own = sum(key.startswith("own/") for key in all_weights(run))
    assert (own > 0) == ((state == "keep" and name != "sync-sgd") or name == "sflv3")
    report = replay.check(load(run))
    assert report.findings == []
    assert report.models > 0
    over_a_cut = name not in ("fl", "sync-sgd")
    assert report.checked == (num_steps(run) if over_a_cut else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("clip_norm", "state"), [(0.0, "reset"), (0.5, "keep")])
def test_with_one_client_the_schemes_are_one(tmp_path: Path, state: str, clip_norm: float) -> None:
    options = {"clients": 1, "optimizer_state": state, "batch_size": 400, "clip_norm": clip_norm}
    names = ("sl", "sflv1", "sflv2", "central", "fl")
    first, *others = (
        joined(simulated_bn_dropout(tmp_path / n, scheme=n, **options)) for n in names
    )
    for other in others:
        assert_equal(first, other)
    if not clip_norm:
        assert_equal(first, ordinary_training(RunConfig(**DEFAULTS | options)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_state": "keep", "participation": 0.6, "rounds": 3},
        {"clip_norm": 0.3, "aggregation_weights": "equal", "local_epochs": 2} | UNEQUAL,
        {"aggregation": "fedadam:lr=0.01", "lr_schedule": "cosine"} | UNEQUAL,
        {"aggregation": "median", "optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    ],
)
def test_sflv1_equals_fl(tmp_path: Path, options: dict[str, object]) -> None:
    """Both average both halves after independent local training."""
    last = options.get("rounds", 2) - 1
    ours = joined(simulated_bn_dropout(tmp_path / "a", scheme="sflv1", **options), last)
    assert_equal(ours, joined(simulated_bn_dropout(tmp_path / "b", scheme="fl", **options), last))


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_fl_equals_plain_federated_averaging(tmp_path: Path, state: str) -> None:
    options = UNEQUAL | {"optimizer_state": state}
    run = simulated_bn_dropout(tmp_path, scheme="fl", **options)
    assert_equal(joined(run), ordinary_training(RunConfig(**DEFAULTS | options)))
    assert not (run / "client_files").exists()
    assert not list(run.glob("models/server_model_*"))


# One cut, u-shaped, and five segments in turns.
CUTS = pytest.mark.parametrize(
    ("cut", "state"), [(CUT, "reset"), (CUT, "keep"), ("3,9", "keep"), ("2,5,7,10", "reset")]
)


@CUTS
def test_sl_equals_a_plain_relay(tmp_path: Path, state: str, cut: int | str) -> None:
    """Gupta & Raskar: client after client, each from the last one's front; one back."""
    options = {"partition": "sizes:0.5,0.3,0.2", "optimizer_state": state, "cut": cut}
    run = simulated_bn_dropout(tmp_path, scheme="sl", **options)
    plain = Plain(RunConfig(**DEFAULTS | options))
    last = 0
    for round_index in range(2):
        plain.start_round()
        for k in draw(plain.run, range(3), round_index):
            plain.fronts[k].load_state_dict(plain.fronts[last].state_dict())
            for step, indices in plain.batches(k, round_index):
                plain.step(k, 0, round_index, step, indices)
            last = k
    assert_equal(joined(run), plain.weights(last))


@CUTS
def test_sflv2_equals_a_plain_loop_in_drawn_order(
    tmp_path: Path, state: str, cut: int | str
) -> None:
    """One back takes step i of every client in the round's order before step i+1."""
    options = {"partition": "sizes:0.5,0.3,0.2", "optimizer_state": state, "cut": cut}
    run = simulated_bn_dropout(tmp_path, scheme="sflv2", **options)
    plain = Plain(RunConfig(**DEFAULTS | options))
    for round_index in range(2):
        plain.start_round()
        left = {
            k: list(plain.batches(k, round_index)) for k in draw(plain.run, range(3), round_index)
        }
        while any(left.values()):
            for k in left:
                if left[k]:
                    plain.step(k, 0, round_index, *left[k].pop(0))
        plain.average(plain.fronts)
    assert_equal(joined(run), plain.weights())


@CUTS
def test_sflv3_equals_plain_loops_that_share_the_average_back(
    tmp_path: Path, state: str, cut: int | str
) -> None:
    options = {"partition": "sizes:0.5,0.3,0.2", "optimizer_state": state, "cut": cut}
    run = simulated_bn_dropout(tmp_path, scheme="sflv3", **options)
    plain = Plain(RunConfig(**DEFAULTS | options))
    for round_index in range(2):
        plain.start_round()
        for k in range(3):
            for step, indices in plain.batches(k, round_index):
                plain.step(k, k, round_index, step, indices)
        plain.average(plain.backs)
    fronts = tmp_path / "client/r"
    for k in range(3):
        own = joined(fronts / f"client_{k}", kind=f"client_{k}")
        assert_equal(own | joined(run), plain.weights(k))
    assert not list(run.glob("models/client_*_00*"))  # no front left its client


SGD = {"model": "mlp", "cut": 3, "optimizer": "sgd", "lr": 0.1, "clients": 2, "rounds": 3}


def large_batch(run: RunConfig, batch_size: int) -> dict[str, torch.Tensor]:
    """Train on the clients' batches joined to one, by plain SGD."""
    model = build(model_spec(run.model), (1, 28, 28), 10, seed=run.seed)
    optimizer = OPTIMIZERS["sgd"](model.parameters(), run)
    data = data_of(run)
    for round_index in range(run.rounds):
        drawn = [
            batch_indices(len(part.train), run, round_index=round_index, client=k)
            for k, part in enumerate(data)
        ]
        for step in zip(*drawn, strict=True):
            batches = [part.batch(part.train, i) for part, i in zip(data, step, strict=True)]
            x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            assert len(x) == 2 * batch_size
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("name", "batch_size"), [("sync-sgd", 400), ("sflv1", 1600), ("fl", 1600)])
def test_synchronous_steps_equal_large_batch_steps(
    tmp_path: Path, name: str, batch_size: int
) -> None:
    """1600 training samples each: one step a round with sflv1 and fl, four with sync-sgd."""
    options = SGD | {"batch_size": batch_size}
    ours = joined(simulated_bn_dropout(tmp_path, scheme=name, **options), 2)
    theirs = large_batch(RunConfig(**options), batch_size)
    start = joined(tmp_path / "server/r", 0)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert not torch.equal(ours[key], start[key])
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-6), key


def test_sync_sgd_weighs_unequal_batches_by_their_samples(tmp_path: Path) -> None:
    """Clients of 640, 640 and 1920 samples: batches of 640, 640 and 1000, then of 920 alone."""
    options = {"partition": "sizes:0.2,0.2,0.6", "batch_size": 1000, "clients": 3, "rounds": 1}
    run = RunConfig(**SGD | options)
    ours = joined(simulated_bn_dropout(tmp_path, scheme="sync-sgd", **SGD | options), 0)
    model, data = build(model_spec("mlp"), (1, 28, 28), 10, seed=0), data_of(run)
    drawn = [
        list(batch_indices(len(part.train), run, round_index=0, client=k))
        for k, part in enumerate(data)
    ]
    assert [[len(i) for i in steps] for steps in drawn] == [[640], [640], [1000, 920]]
    optimizer = OPTIMIZERS["sgd"](model.parameters(), run)
    for step in range(2):
        there = [k for k in range(3) if step < len(drawn[k])]
        batches = [data[k].batch(data[k].train, drawn[k][step]) for k in there]
        x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for key, tensor in model.state_dict().items():
        assert torch.allclose(ours[key], tensor, rtol=0, atol=1e-6), key


def processed(run: Path, round_index: int = 0) -> list[tuple[int, int]]:
    """Return (client, step) as one back took them."""
    steps = archive.open(run).steps(round=round_index)
    return [(step.client, step.step) for step in steps]


def test_a_shared_back_takes_steps_in_the_drawn_order(tmp_path: Path) -> None:
    options = {"partition": "sizes:0.5,0.3,0.2", "rounds": 3, "batch_size": 400, "model": "mlp"}
    run = simulated_bn_dropout(tmp_path, scheme="sflv2", **options | {"cut": 3})
    config = RunConfig(**DEFAULTS | options)
    counts = {0: 4, 1: 3, 2: 2}  # steps of 1600, 960 and 640 samples
    orders = [draw(config, range(3), r) for r in range(3)]
    assert len({tuple(order) for order in orders}) > 1
    for round_index, order in enumerate(orders):
        expected = [(k, i) for i in range(4) for k in order if i < counts[k]]
        assert processed(run, round_index) == expected
        assert [k for k, _ in expected] == list(interleaved(order, counts))


def test_clients_take_turns_in_sl(tmp_path: Path) -> None:
    run = simulated_bn_dropout(tmp_path, scheme="sl", batch_size=300)
    for round_index in range(2):
        order = draw(RunConfig(), range(3), round_index)
        assert processed(run, round_index) == [(k, i) for k in order for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_steps_in_order_of_arrival_are_recorded_and_replayed(
    launcher: Launcher, state: str
) -> None:
    options = ["--scheme", "sflv2", "--server-order", "arrival", "--optimizer-state", state]
    options += ["--model", BN_DROPOUT, "--cut", CUT, "--rounds", 2, "--batch-size", 20]
    run = launcher.run(*options, client_options=["--allow-import", BN_DROPOUT])
    steps = processed(run)
    assert len(steps) == 3 * 54
    assert steps != [(k, i) for i in range(54) for k in draw(RunConfig(), range(3), 0)]
    report = replay.check(load(run))
    assert report.findings == []
    assert report.summary == "324 gradients checked, 0 differ"


def test_the_share_that_participates_is_drawn_each_round(tmp_path: Path) -> None:
    run = RunConfig(participation=0.6, clients=10)
    drawn = [draw(run, range(10), r) for r in range(50)]
    assert all(len(set(order)) == len(order) == 6 for order in drawn)
    counts = [sum(k in order for order in drawn) for k in range(10)]
    assert min(counts) > 15
    assert max(counts) < 45
    assert drawn == [draw(run, range(10), r) for r in range(50)]
    assert len(draw(RunConfig(participation=0.01), range(3), 0)) == 1
    assert sorted(draw(RunConfig(), [0, 3, 4], 0)) == [0, 3, 4]


def test_who_sits_out_evaluates_all_the_same(tmp_path: Path) -> None:
    run = simulated_bn_dropout(tmp_path, participation=0.3, rounds=3)
    for round_index in range(3):
        (trained,) = draw(RunConfig(participation=0.3), range(3), round_index)
        rows = read(run / f"rounds/round_{round_index:03d}.csv")
        assert {int(row["client"]) for row in rows if row["metric"] == "loss"} == {trained}
        assert {int(row["client"]) for row in rows if row["metric"] == "val_acc"} == {0, 1, 2}
        samples = {int(r["client"]): float(r["value"]) for r in rows if r["metric"] == "samples"}
        assert [k for k in samples if samples[k]] == [trained]
        ours = {path.name for path in run.glob(f"models/client_?_{round_index:03d}.pt")}
        assert ours == {f"client_{trained}_{round_index:03d}.pt"}


@pytest.mark.slow
def test_a_scheme_of_groups_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFLG: clients in two groups, a back for each; groups' backs and all fronts are averaged."""
    row = Scheme(source="SFLG", back_of=lambda client: client % 2)
    monkeypatch.setitem(schemes.SCHEMES, "sflg", row)
    options = {"clients": 4, "partition": "sizes:0.4,0.3,0.2,0.1", "batch_size": 200}
    run = simulated_bn_dropout(tmp_path, scheme="sflg", **options)
    plain = Plain(RunConfig(**DEFAULTS | options))
    for round_index in range(2):
        plain.start_round()
        order = draw(plain.run, range(4), round_index)
        for group in range(2):
            left = {k: list(plain.batches(k, round_index)) for k in order if k % 2 == group}
            while any(left.values()):
                for k in left:
                    if left[k]:
                        plain.step(k, group, round_index, *left[k].pop(0))
        plain.average(plain.fronts)
        counts = [sum(len(plain.data[k].train) for k in (g, g + 2)) for g in range(2)]
        states = [plain.backs[g].state_dict() for g in range(2)]
        average = {
            name: sum(s[name].double() * n for s, n in zip(states, counts, strict=True))
            / sum(counts)
            for name in states[0]
        }
        for g, state in enumerate(states):
            rounded = {
                n: a if state[n].is_floating_point() else a.round() for n, a in average.items()
            }
            plain.backs[g].load_state_dict({n: a.to(state[n].dtype) for n, a in rounded.items()})
    assert_equal(joined(run), plain.weights())
    report = replay.check(load(run))
    assert report.findings == []
    assert report.differ == 0 < report.checked


def test_a_scheme_over_a_cut_needs_blocks_on_both_sides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs blocks on both sides"):
        simulated_bn_dropout(tmp_path, scheme="sl", cut=12)
    simulated_bn_dropout(tmp_path, scheme="fl", cut=12, rounds=1, batch_size=1000)
