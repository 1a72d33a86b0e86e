"""Averages against hand-computed ones."""

import numpy as np
import pytest
import torch

from sfl.aggregate import fed_avg
from tests.models import bn_dropout


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
