"""Averages against hand-computed ones."""

import numpy as np
import pytest
import torch

from sfl.strategy.aggregate import RULES, Update, fed_avg
from tests.support.models import bn_dropout


def model_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = bn_dropout((1, 28, 28), 10)
    model(torch.randn(8, 1, 28, 28))  # moves the BatchNorm buffers
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("counts", [(1, 1, 1), (1067, 1068, 800), (16000, 16000, 48001)])
def test_the_average_of_identical_models_is_that_model(counts: tuple[int, ...]) -> None:
    state = model_state(0)
    average = fed_avg([state, state, state], counts)
    assert average.keys() == state.keys()
    for name in state:
        assert average[name].dtype == state[name].dtype
        assert torch.equal(average[name], state[name]), name


def test_an_unequal_average_is_the_hand_computed_one() -> None:
    ours = fed_avg(
        [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, -2.0])}], weights=[30, 10]
    )
    assert torch.equal(ours["w"], torch.tensor([2.0, 1.0]))


def test_averages_of_models_equal_numpys() -> None:
    states, counts = [model_state(k) for k in range(3)], [200, 300, 1500]
    average = fed_avg(states, counts)
    for name, tensor in average.items():
        arrays = [state[name].numpy().astype(np.float64) for state in states]
        mean = sum(n * a for n, a in zip(counts, arrays, strict=True)) / sum(counts)
        expected = mean.astype(np.float32) if tensor.is_floating_point() else np.rint(mean)
        assert np.array_equal(tensor.numpy(), expected), name


def test_integer_buffers_stay_integer() -> None:
    states = [{"n": torch.tensor(34)}, {"n": torch.tensor(34)}, {"n": torch.tensor(101)}]
    average = fed_avg(states, [1, 1, 1])
    assert average["n"].dtype == torch.int64
    assert average["n"].item() == 56  # 169 / 3


def test_inputs_are_left_alone() -> None:
    state = {"w": torch.ones(3)}
    average = fed_avg([state], [5])
    average["w"].zero_()
    assert torch.equal(state["w"], torch.ones(3))


@pytest.mark.parametrize("weights", [[], [1], [0, 0], [-1, 2]])
def test_weights_that_make_no_sense_are_refused(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="one state and one weight"):
        fed_avg([{"w": torch.ones(1)}] * 2, weights)


# The rules, each against a few lines of numpy.

START = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "mean": torch.tensor([0.1, 0.2])}
START |= {"seen": torch.tensor(10)}
TRAINED = frozenset({"w"})


def trained_states(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    return [
        {
            "w": START["w"] + torch.randn(2, 2, generator=drawn),
            "mean": START["mean"] + torch.randn(2, generator=drawn),
            "seen": START["seen"] + k,
        }
        for k in range(count)
    ]


def stacked(states: list[dict[str, torch.Tensor]], name: str) -> np.ndarray:
    return np.stack([state[name].numpy().astype(np.float64) for state in states])


def mean_of(states: list[dict[str, torch.Tensor]], weights: list[int], name: str) -> np.ndarray:
    return np.average(stacked(states, name), axis=0, weights=weights)


def run_rule(
    name: str, rounds: int, weights: list[int], **options: float
) -> list[dict[str, torch.Tensor]]:
    """Return the results of several rounds, each from the one before, on the same drift."""
    results, memory, current = [], {}, START
    for round_index in range(rounds):
        states = trained_states(len(weights), seed=round_index)
        update = Update(states, weights, start=current, trained=TRAINED, memory=memory)
        current, memory = RULES[name](update, **options)
        results.append(current)
    return results


SECOND = {
    "fedadagrad": lambda v, d: v + d**2,
    "fedadam": lambda v, d: 0.99 * v + 0.01 * d**2,
    "fedyogi": lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2),
}


@pytest.mark.parametrize("name", list(SECOND))
def test_adaptive_rules_equal_numpys(name: str) -> None:
    weights = [3, 1, 2]
    beta1 = 0.0 if name == "fedadagrad" else 0.9
    w = START["w"].numpy().astype(np.float64)
    m, v = np.zeros((2, 2)), np.full((2, 2), 0.01**2)
    for round_index, ours in enumerate(run_rule(name, 3, weights, lr=0.2, tau=0.01)):
        states = trained_states(3, seed=round_index)
        delta = mean_of(states, weights, "w") - w
        m = beta1 * m + (1 - beta1) * delta
        v = SECOND[name](v, delta)
        w = (w + 0.2 * m / (np.sqrt(v) + 0.01)).astype(np.float32).astype(np.float64)
        assert np.allclose(ours["w"].numpy(), w, rtol=1e-6, atol=0)
        assert np.allclose(ours["mean"].numpy(), mean_of(states, weights, "mean"), rtol=1e-6)
        assert ours["seen"].item() == 11  # (30 + 11 + 24) / 6 = 10.83
        assert ours["seen"].dtype == torch.int64


def test_fed_avg_m_equals_numpys() -> None:
    weights = [3, 1, 2]
    w, velocity = START["w"].numpy().astype(np.float64), np.zeros((2, 2))
    for round_index, ours in enumerate(run_rule("fedavgm", 3, weights, lr=0.5, beta=0.8)):
        states = trained_states(3, seed=round_index)
        velocity = 0.8 * velocity + mean_of(states, weights, "w") - w
        w = (w + 0.5 * velocity).astype(np.float32).astype(np.float64)
        assert np.allclose(ours["w"].numpy(), w, rtol=1e-6, atol=0)
        assert np.allclose(ours["mean"].numpy(), mean_of(states, weights, "mean"), rtol=1e-6)


def test_fed_avg_m_without_momentum_is_fed_avg() -> None:
    weights = [3, 1, 2]
    (ours,) = run_rule("fedavgm", 1, weights, beta=0.0)
    (theirs,) = run_rule("fedavg", 1, weights)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6), name


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_median_equals_numpys(count: int) -> None:
    (ours,) = run_rule("median", 1, [7] * count)
    states = trained_states(count)
    for name in ("w", "mean"):
        expected = np.median(stacked(states, name), axis=0).astype(np.float32)
        assert np.array_equal(ours[name].numpy(), expected)
    assert ours["seen"].item() == round(float(np.median([10 + k for k in range(count)])))


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_the_trimmed_mean_equals_numpys(trim: int) -> None:
    (ours,) = run_rule("trimmed-mean", 1, [1, 1, 9, 1, 1, 1], trim=trim)
    states = trained_states(6)
    for name in ("w", "mean"):
        kept = np.sort(stacked(states, name), axis=0)[trim : 6 - trim]
        assert np.allclose(ours[name].numpy(), kept.mean(0), rtol=1e-6, atol=1e-7)
    assert ours["seen"].dtype == torch.int64


def test_krum_takes_the_model_that_numpy_takes() -> None:
    for seed in range(5):
        states = trained_states(7, seed)
        states[2]["w"] += 100
        flat = stacked(states, "w").reshape(7, -1)
        distances = np.sort(((flat[:, None] - flat[None]) ** 2).sum(-1), axis=1)
        best = int(distances[:, 1 : 1 + 7 - 2 - 2].sum(1).argmin())  # K - f - 2 others
        ours, _ = RULES["krum"](Update(states, [1] * 7, START, TRAINED), faulty=2)
        assert best != 2
        assert all(torch.equal(ours[name], states[best][name]) for name in ours)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum"])
def test_a_robust_rule_withstands_a_client_that_sends_nonsense(name: str) -> None:
    states = trained_states(5)
    states[3] = {key: tensor + 1000 for key, tensor in states[3].items()}
    ours, _ = RULES[name](Update(states, [1] * 5, START, TRAINED))
    assert (ours["w"] - START["w"]).abs().max() < 5
    mean, _ = RULES["fedavg"](Update(states, [1] * 5, START, TRAINED))
    assert (mean["w"] - START["w"]).abs().max() > 100


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_of_identical_models_keeps_batch_norm_whole(name: str) -> None:
    """Buffers of a real model: positive variances stay positive, the counter an integer."""
    states = [model_state(k) for k in range(5)]
    start = model_state(9)
    names = frozenset(n for n, _ in bn_dropout((1, 28, 28), 10).named_parameters())
    ours, _ = RULES[name](Update(states, [1] * 5, start, names))
    assert ours.keys() == start.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == start[key].dtype, key
        assert tensor.shape == start[key].shape, key
        if key.endswith("running_var"):
            assert (tensor > 0).all()
    again, _ = RULES[name](Update([start] * 5, [1] * 5, start, names))
    for key, tensor in again.items():
        assert torch.allclose(tensor, start[key], rtol=1e-6), key


@pytest.mark.parametrize("name", list(RULES))
def test_rules_leave_their_inputs_alone(name: str) -> None:
    states, start = trained_states(5), {key: t.clone() for key, t in START.items()}
    copies = [{key: t.clone() for key, t in state.items()} for state in states]
    result, _ = RULES[name](Update(states, [1] * 5, start, TRAINED))
    for tensor in result.values():
        tensor.zero_()
    for state, copied in zip([*states, start], [*copies, START], strict=True):
        assert all(torch.equal(state[key], copied[key]) for key in copied)
