"""Clipping, learning-rate schedules and FedProx do what they say."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.support.costs import segments_of
from sfl.config import RunConfig
from sfl.conversation.fed import FedRounds
from sfl.data.client_data import batch_indices
from sfl.errors import ConfigError, ProtocolError
from sfl.files.torch_file import encode_state
from sfl.model.metrics import checked
from sfl.model.schedule import SCHEDULES, learning_rates
from sfl.model.segment import train_step
from sfl.model.zoo import build, model_spec
from sfl.registry import with_options
from sfl.strategy.merge import fewest_clients, fewest_connected
from sfl.strategy.order import Turns, interleaved
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import SCHEMES, Scheme
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from tests.support.launch import Launcher
from tests.support.plain_training import data_of
from tests.support.simulations import simulated_bn_dropout
from tests.support.weights import joined

CPU = torch.device("cpu")
X, Y = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def step_sizes(scheme: str, clip_norm: float, cut: int = 7) -> dict[str, float]:
    """Return how far one SGD step with learning rate 1 moves each half of LeNet."""
    run = RunConfig(scheme=scheme, cut=cut, optimizer="sgd", lr=1.0, clip_norm=clip_norm)
    model = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    segments = list(segments_of(model, CPU).values())
    front = segments[0]
    before = {name: t for segment in segments for name, t in segment.parameters().items()}
    z = front.forward(X, Position()) if model.cuts else X
    _, dz = train_step(segments[-1], z, Y, Position())
    if model.cuts:
        front.backward(dz)
    for segment in segments:
        segment.update()
    moved = {n: t - before[n] for segment in segments for n, t in segment.parameters().items()}
    halves = {half: [t for n, t in moved.items() if n.startswith("conv") == (half == "front")]
              for half in ("front", "back")}  # fmt: skip
    return {half: norm(tensors) for half, tensors in halves.items()}


@pytest.mark.parametrize("scheme", ["sflv1", "central", "fl", "sync-sgd"])
def test_gradients_are_clipped_by_half(scheme: str) -> None:
    free = step_sizes(scheme, 0)
    assert 0.01 < free["front"] < 0.9 * free["back"]
    limit = (free["front"] + free["back"]) / 2
    assert step_sizes(scheme, limit) == {
        "front": pytest.approx(free["front"]), "back": pytest.approx(limit, rel=1e-3)
    }  # fmt: skip
    assert step_sizes(scheme, free["front"] / 2)["front"] == pytest.approx(
        free["front"] / 2, rel=1e-3
    )


def test_schedules_are_the_formulas() -> None:
    def rates(schedule: str) -> list[float]:
        run = RunConfig(lr=0.8, lr_schedule=schedule, rounds=4)
        return [learning_rates(run)(r) for r in range(4)]

    assert rates("constant") == [0.8] * 4
    assert rates("step:every=2,factor=0.5") == [0.8, 0.8, 0.4, 0.4]
    assert rates("cosine") == pytest.approx([0.8, 0.68284271, 0.4, 0.11715729])
    assert rates("cosine:floor=0.5") == pytest.approx([0.8, 0.74142136, 0.6, 0.45857864])


@pytest.mark.parametrize("scheme", ["sflv1", "sl", "fl", "sync-sgd"])
def test_a_schedule_reaches_both_halves(tmp_path: Path, scheme: str) -> None:
    options = {"model": "mlp", "cut": 3, "batch_size": 500, "optimizer": "sgd", "lr": 0.1}
    options |= {"scheme": scheme, "lr_schedule": "step:every=1,factor=1e-20", "rounds": 2}
    run = simulated_bn_dropout(tmp_path, **options, optimizer_state="keep", momentum=0.5)
    first, second = joined(run, 0), joined(run, 1)
    initial = build(model_spec("mlp"), (1, 28, 28), 10, seed=0).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], initial[name]) for name in first)


def test_fedprox_adds_its_term_to_the_loss(tmp_path: Path) -> None:
    """Li et al. 2020, Equation 2, written out: h = F + mu/2 |w - w_t|^2, on each client."""
    options = {"model": "mlp", "cut": 3, "optimizer": "sgd", "lr": 0.1, "clients": 1, "rounds": 2}
    options |= {"batch_size": 400, "fedprox_mu": 0.8}
    ours = joined(simulated_bn_dropout(tmp_path / "a", scheme="fl", **options), 1)
    run = RunConfig(**options)
    model, (data,) = build(model_spec("mlp"), (1, 28, 28), 10, seed=0), data_of(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for round_index in range(2):
        anchors = [p.detach().clone() for p in model.parameters()]
        for indices in batch_indices(len(data.train), run, round_index=round_index, client=0):
            x, y = data.batch(data.train, indices)
            pull = sum(
                ((p - a) ** 2).sum() for p, a in zip(model.parameters(), anchors, strict=True)
            )
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + 0.4 * pull).backward()
            optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-6), name
    without = joined(
        simulated_bn_dropout(tmp_path / "b", scheme="fl", **options | {"fedprox_mu": 0.0}), 1
    )
    assert not any(torch.allclose(ours[n], without[n], rtol=0, atol=1e-5) for n in ours)


def test_fedprox_pulls_the_client_side_half_alone(tmp_path: Path) -> None:
    run = RunConfig(fedprox_mu=1.0, optimizer="sgd", lr=0.1)
    model = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    for segment, pulled in zip(segments_of(model, CPU).values(), (True, False), strict=True):
        segment.start_round(0)
        start = segment.parameters()
        segment.load_parameters({name: tensor + 1 for name, tensor in start.items()})
        z = X if pulled else torch.zeros(16, 400)
        out = segment.forward(z, Position())
        segment.backward(torch.zeros_like(out))
        grads = segment.gradients()
        wanted = 1.0 if pulled else 0.0
        assert all(torch.allclose(g, torch.full_like(g, wanted), atol=1e-5) for g in grads.values())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stepp", "did you mean step"),
        ("step:every", "must be of type int"),
        ("step:every=1.5", "must be of type int"),
        ("step:", "no option ''; it has every, factor"),
        ("constant:x=1", "no option 'x'; it has none"),
        ("cosine:floor=2", "floor in"),
    ],
)
def test_options_behind_a_colon_are_checked(text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        with_options("lr-schedule", text, SCHEDULES)(1, 2)


@pytest.mark.parametrize(
    ("loss", "correct"),
    [(-0.5, 1), (1e80, 1), (float("-inf"), 1), (1.0, -1), (1.0, 11), (1.0, 10**400), (1.0, 0.5)],
)
def test_figures_that_cannot_be_are_refused(loss: float, correct: float) -> None:
    with pytest.raises(ProtocolError):
        checked(loss, [correct], 10)


def test_figures_of_a_run_that_diverged_are_figures() -> None:
    assert checked(float("inf"), [0], 10) == (float("inf"), (0,))
    assert str(checked(float("nan"), [10.0], 10)) == "(nan, (10,))"


@pytest.mark.parametrize(
    ("scheme", "rule", "wanted"),
    [
        ("sl", "median", "--scheme sl averages no trained models"),
        ("sync-sgd", "fedadam", "--scheme sync-sgd averages no trained models"),
        ("central", "median", "--scheme central averages no trained models"),
        ("fl", "krum:faulty=1", "2 faulty"),
        ("sl", "krumm", "did you mean krum"),
    ],
)
def test_a_rule_that_has_nothing_to_do_is_refused(scheme: str, rule: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        fewest_clients(Recipe.of(RunConfig(scheme=scheme, aggregation=rule)))


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add schemes whose clients share a back in two and in three groups."""
    monkeypatch.setitem(SCHEMES, "two", Scheme(source="-", back_of=lambda client: client % 2))
    monkeypatch.setitem(SCHEMES, "three", Scheme(source="-", back_of=lambda client: client % 3))


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize(
    ("scheme", "rule", "clients", "participation", "fewest", "connected"),
    [
        ("sflv1", "fedavg", 3, 1, 1, 1),
        ("sflv1", "median", 3, 1, 1, 1),
        ("sflv1", "trimmed-mean", 3, 1, 3, 3),
        ("sflv2", "trimmed-mean:trim=2", 9, 1, 5, 5),
        ("sflv3", "krum:faulty=1", 9, 1, 5, 5),
        ("fl", "trimmed-mean", 9, 0.5, 3, 5),
        ("three", "trimmed-mean", 6, 1, 5, 5),  # four may share two copies
        ("three", "trimmed-mean", 7, 0.8, 6, 7),  # five may share two copies
    ],
)
def test_the_fewest_clients_are_those_that_the_rule_takes_whoever_they_are(
    scheme: str, rule: str, clients: int, participation: float, fewest: int, connected: int
) -> None:
    options = {"scheme": scheme, "clients": clients, "participation": participation}
    recipe = Recipe.of(RunConfig(**options, aggregation=rule))
    assert fewest_clients(recipe) == fewest
    assert fewest_connected(recipe) == connected


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize(
    ("scheme", "clients", "participation", "averages"),
    [
        ("sflv2", 2, 1, "2 models below 1; --scheme sflv2 averages the models of 2 clients"),
        ("sflv3", 2, 1, "2 models below 1; --scheme sflv3 averages 2 copies of the back"),
        ("two", 4, 1, "2 models below 1; --scheme two averages 2 copies of the back"),
        # The draw of round 0 has three copies, that of round 3 two.
        ("three", 6, 0.5, "2 models below 1; --scheme three averages 2 copies of the back"),
    ],
)
def test_a_rule_that_refuses_as_few_models_as_a_round_may_have_says_which(
    scheme: str, clients: int, participation: float, averages: str
) -> None:
    options = {"scheme": scheme, "clients": clients, "participation": participation, "seed": 2}
    with pytest.raises(ConfigError, match=averages):
        fewest_clients(Recipe.of(RunConfig(**options, aggregation="trimmed-mean")))


@pytest.mark.parametrize("schedule", ["step:every=1,factor=1e200", "step:every=1,factor=1e20"])
def test_a_schedule_that_explodes_is_refused_before_the_start(schedule: str) -> None:
    with pytest.raises(ConfigError, match="--lr-schedule"):
        learning_rates(RunConfig(lr_schedule=schedule, rounds=10))


def test_turns_do_not_unfold_what_a_client_claims() -> None:
    """A sequence of billions of steps is taken one by one."""
    turns = Turns(interleaved([1, 0], {0: 2**40, 1: 2**40}))
    for client in (1, 0, 1):
        assert turns.of(client)()
        assert not turns.of(1 - client)()
        turns.done()


NOT_FINITE = r"hold (NaN or infinity|numbers whose squares overflow)"


@pytest.mark.parametrize("scheme", ["sflv1", "fl", "sync-sgd"])
def test_a_simulation_that_diverges_says_so_and_goes_on(tmp_path: Path, scheme: str) -> None:
    options = {"scheme": scheme, "model": "mlp", "optimizer": "sgd", "lr": 1e20, "rounds": 1}
    options["cut"] = 3
    folder = simulated_bn_dropout(tmp_path, **options)
    log = (folder / "server_log.txt").read_text()
    warned = [line for line in log.splitlines() if "warning: " in line]
    assert warned
    assert all(re.search(f"{NOT_FINITE} in round 1", line) for line in warned)
    assert len(warned) <= 3  # once a round for each client


def test_all_that_a_peer_sends_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def look(tensors: object, name: str, policy: str, warn: object) -> None:
        seen.add(re.sub(r"\d+", "N", name))

    monkeypatch.setattr("sfl.conversation.party.check_finite", look)
    for scheme in ("sflv1", "sl", "sync-sgd"):
        simulated_bn_dropout(tmp_path / scheme, scheme=scheme, model="mlp", cut=3, rounds=1)
    assert seen >= {
        "the activations of client N",
        "the gradients of client N",
        "the weights of client N",
        "the weights client_avg",
        "the weights client_N",
        "the gradients of client_N",
        "the weights after step N",
    }


def test_a_fed_server_refuses_nan() -> None:
    split = SplitModel(Recipe.of(RunConfig(model="mlp", run="r")), (1, 28, 28), 10)
    state = {name: torch.full_like(t, torch.nan) for name, t in split.front_state().items()}

    class Store:
        def get(self, key: object, held: bytes = b"") -> Iterator[None]:
            yield from ()
            return encode_state(state)

    said: list[str] = []
    folder = SimpleNamespace(events=SimpleNamespace(say=said.append))
    for policy, refused in (("reject", True), ("log", False)):
        split.recipe = split.recipe.changed(on_nonfinite=policy)
        rounds = FedRounds(None, {0: Store()}, {0: 1}, split, folder, None, {})
        turns = SimpleNamespace(of=lambda client: lambda: True, in_order=False)
        with pytest.raises(ProtocolError) if refused else contextlib.nullcontext():
            list(rounds._collect(0, 0, turns, []))
    assert len(said) == 1


def test_a_server_that_lets_nan_pass_says_so_once_a_round(launcher: Launcher) -> None:
    options = ["--model", "mlp", "--optimizer", "sgd", "--lr", "1e20", "--rounds", 2]
    run = launcher.run(*options, "--batch-size", 200, "--on-nonfinite", "log", clients=2)
    log = (run / "server_log.txt").read_text()
    for r in (1, 2):
        assert 1 <= len(re.findall(f"{NOT_FINITE} in round {r}\n", log)) <= 2
    refused = launcher.server(*options, "--clients", 1, "--run", "s", "--batch-size", 200)
    client = launcher.client("--reconnect-timeout", 0)
    assert re.search(f"{NOT_FINITE}: a lower --lr", client.ended_with(1))
    assert re.search(NOT_FINITE, refused.ended_with(1))
