"""Our optimisers take the steps of torch's, bit for bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sfl.config import RunConfig
from sfl.optimizers import OPTIMIZERS, Adam, take_step

LR = 0.01


def parameters() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in ((50, 30), (7,))]


class Pair:
    """Our Adam and torch's, from the same weights, under the same gradients."""

    def __init__(self, weight_decay: float = 0.0) -> None:
        run = RunConfig(lr=LR, weight_decay=weight_decay)
        self.weights, self.others = parameters(), parameters()
        self.ours = OPTIMIZERS["adam"](self.weights, run)
        self.torchs = torch.optim.Adam(self.others, lr=LR, weight_decay=weight_decay)
        self._drawn = torch.Generator().manual_seed(4)

    def step(self, *, without: int | None = None) -> None:
        for index, (one, other) in enumerate(zip(self.weights, self.others, strict=True)):
            grad = torch.randn(one.shape, generator=self._drawn)
            one.grad, other.grad = (None, None) if index == without else (grad, grad.clone())
        take_step(self.ours)
        self.torchs.step()

    def check(self) -> None:
        for one, other in zip(self.weights, self.others, strict=True):
            assert torch.equal(one, other)
        ours, torchs = self.ours.state_dict()["state"], self.torchs.state_dict()["state"]
        assert ours.keys() == torchs.keys()
        for index, state in ours.items():
            assert state.keys() == torchs[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(state[name], torchs[index][name]) for name in state)


def load_states(pair: Pair) -> None:
    for optimizer in (pair.ours, pair.torchs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def slow_down(pair: Pair) -> None:
    for optimizer in (pair.ours, pair.torchs):
        optimizer.param_groups[0]["lr"] = LR / 7


def take_more_in(pair: Pair) -> None:
    for optimizer, weights in ((pair.ours, pair.weights), (pair.torchs, pair.others)):
        weights.append(nn.Parameter(torch.ones(5)))
        optimizer.add_param_group({"params": weights[-1:]})


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("between", [lambda pair: None, load_states, slow_down, take_more_in])
def test_adam_takes_the_steps_of_torchs(
    weight_decay: float, between: Callable[[Pair], None]
) -> None:
    pair = Pair(weight_decay)
    for _ in range(20):
        pair.step()
        pair.check()
    between(pair)
    for _ in range(20):
        pair.step()
        pair.check()


@pytest.mark.parametrize("first", [False, True])
def test_adam_leaves_a_parameter_without_a_gradient_as_it_is(first: bool) -> None:
    pair = Pair()
    if not first:
        pair.step()
    pair.step(without=1)
    pair.check()
    pair.step()
    pair.step(without=0)
    pair.check()


@pytest.mark.parametrize(("device", "num_calls"), [("cpu", 1), ("meta", 5)])
def test_adam_runs_torchs_python_but_once_on_the_cpu_and_always_elsewhere(
    monkeypatch: pytest.MonkeyPatch, device: str, num_calls: int
) -> None:
    calls = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (calls.append(self), step(self)))
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = OPTIMIZERS["adam"]([weight], RunConfig())
    weight.grad = torch.ones_like(weight)
    for _ in range(5):
        take_step(optimizer)
    assert calls == [optimizer] * num_calls


def test_a_copy_of_adam_trains_its_own_weights() -> None:
    pair = Pair()
    pair.step()
    before = [weight.detach().clone() for weight in pair.weights]
    twin = copy.deepcopy(pair.ours)
    assert isinstance(twin, Adam)
    for weight in twin.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    take_step(twin)
    assert all(map(torch.equal, before, pair.weights))
    for copied, weight in zip(twin.param_groups[0]["params"], before, strict=True):
        assert not torch.equal(copied, weight)
