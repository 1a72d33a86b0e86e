"""Adam is torch's fused one, and computes the same whatever the layout of a user's tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfl.config import RunConfig
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.segment import Segment, train_step
from sfl.model.training import Training
from sfl.model.zoo import build, model_spec
from sfl.values import Position
from tests.support import models
from tests.support.launch import Launcher
from tests.support.plain_training import data_of, ordinary_training, train_round
from tests.support.runs import go_on
from tests.support.simulations import simulated_bn_dropout
from tests.support.weights import assert_equal, joined

CPU, AT = torch.device("cpu"), Position("r", 0, 0, 0)
RUN = RunConfig(run="r", lr=0.01, weight_decay=0.02)
PLAIN, CHANNELS_LAST = "tests.support.models:convolutions", "tests.support.models:channels_last"
KEEP = {"optimizer_state": "keep", "cut": 2, "batch_size": 400}
Layout = Callable[[Tensor], Tensor]


def seen_as_channels_last(tensor: Tensor) -> Tensor:
    """Return a tensor of the same numbers, those of convolutions in another order in memory."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def twice_negated(tensor: Tensor) -> Tensor:
    """Return a view that says of memory of the opposite sign that it is to be negated."""
    return torch._neg_view(-tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


LAYOUTS = [seen_as_channels_last, twice_negated, transposed]


def plain() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a model in plain layout, and torch's Adam for it."""
    torch.manual_seed(3)
    model = models.convolutions((1, 28, 28), 10)
    adam = torch.optim.Adam(model.parameters(), lr=RUN.lr, weight_decay=0.02, fused=True)
    return model, adam


def segment(model: nn.Sequential) -> Segment:
    made = Segment(model, 0, Training.of(RUN, (2,)), CPU)
    made.start_round(0)
    return made


def gradients(model: nn.Sequential) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def step(model: nn.Sequential, adam: torch.optim.Optimizer, grads: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].clone()
    adam.step()


def assert_the_same(ours: Segment, model: nn.Sequential, adam: torch.optim.Optimizer) -> None:
    assert_equal(ours.state(), dict(model.state_dict()), at_least=6)
    states = adam.state_dict()["state"]
    theirs = {f"{i}.{name}": t for i, state in states.items() for name, t in state.items()}
    assert_equal(ours.optimizer.state(), theirs, at_least=18)


def test_parameters_in_another_layout_train_to_the_bits_of_a_plain_loop() -> None:
    model, adam = plain()
    ours = segment(plain()[0].to(memory_format=torch.channels_last))
    for _ in range(3):
        x, y = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
        train_step(ours, x, y, AT)
        ours.update()
        assert_the_same(ours, model, adam)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_another_layout_take_the_same_step(layout: Layout) -> None:
    (model, adam), ours = plain(), segment(plain()[0])
    for _ in range(3):
        grads = gradients(model)
        step(model, adam, grads)
        ours.set_gradients({name: layout(grad) for name, grad in grads.items()})
        ours.update()
        assert_the_same(ours, model, adam)


def test_a_block_that_changes_its_layout_takes_the_same_step() -> None:
    (model, adam), ours = plain(), segment(plain()[0])
    for _ in range(3):
        grads = gradients(model)
        step(model, adam, grads)
        ours.blocks.to(memory_format=torch.channels_last)
        ours.set_gradients(grads)
        ours.update()
        assert_the_same(ours, model, adam)


@pytest.mark.parametrize("layout", [seen_as_channels_last, transposed])
def test_loaded_moments_in_another_layout_take_the_same_step(layout: Layout) -> None:
    (model, adam), ours = plain(), segment(plain()[0])
    for _ in range(3):
        grads = gradients(model)
        step(model, adam, grads)
        ours.optimizer.load({n: layout(t) for n, t in ours.optimizer.state().items()})
        ours.set_gradients(grads)
        ours.update()
        assert_the_same(ours, model, adam)


def test_a_gradient_that_torch_leaves_negated_is_taken() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imag = (nn.Parameter(torch.ones(())) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            z = torch.complex(self.real, self.imag).conj()
            return x * (z * z).imag

    blocks, drawn = nn.Sequential(nn.Linear(4, 3), Phase()), torch.Generator().manual_seed(1)
    ours = segment(blocks)
    train_step(ours, torch.randn(8, 4, generator=drawn), torch.arange(8) % 3, AT)
    assert any(grad.is_neg() for grad in ours.gradients_in_place())
    ours.update()
    assert blocks[1].imag != 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_adam_is_torchs_with_learning_rate_and_weight_decay(weight_decay: float) -> None:
    model, _ = plain()
    theirs = torch.optim.Adam(model.parameters(), lr=0.03, weight_decay=weight_decay, fused=True)
    run = RunConfig(lr=0.03, weight_decay=weight_decay)
    other, _ = plain()
    ours = OPTIMIZERS["adam"](other.parameters(), run)
    for _ in range(3):
        grads = gradients(model)
        step(model, theirs, grads)
        step(other, ours, grads)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()), at_least=6)


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "state"), [("sflv1", "reset"), ("sync-sgd", "keep")])
def test_a_model_in_another_layout_is_trained_as_in_plain_layout(
    tmp_path: Path, scheme: str, state: str
) -> None:
    options = KEEP | {"optimizer_state": state, "clients": 1}
    ours = joined(
        simulated_bn_dropout(tmp_path / "a", model=CHANNELS_LAST, scheme=scheme, **options)
    )
    expected = ordinary_training(RunConfig(model=PLAIN, **options))
    assert_equal(ours, expected, at_least=6)
    options["clients"] = 2
    ours, theirs = (
        joined(simulated_bn_dropout(tmp_path / model[-4:], model=model, scheme=scheme, **options))
        for model in (CHANNELS_LAST, PLAIN)
    )
    assert_equal(ours, theirs, at_least=6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sflv1", "sync-sgd"])
def test_a_model_in_another_layout_goes_on_as_if_its_run_had_not_ended(
    launcher: Launcher, tmp_path: Path, scheme: str
) -> None:
    options = ["--scheme", scheme, "--optimizer-state", "keep", "--cut", 2, "--batch-size", 400]
    allow = ["--allow-import", CHANNELS_LAST]
    line = ["--model", CHANNELS_LAST, *options, "--rounds", 1]
    launcher.run(*line, clients=1, client_options=allow)
    run = go_on(launcher, "--rounds", 2, clients=1, allow=allow)
    expected = ordinary_training(RunConfig(model=PLAIN, clients=1, **KEEP))
    assert_equal(joined(run), expected, at_least=6)


@pytest.mark.parametrize("name", ["in_float64", "in_float16", "in_bfloat16"])
def test_weights_of_any_real_dtype_are_trained(
    launcher: Launcher, tmp_path: Path, name: str
) -> None:
    """With one client that is never averaged: float64 would lose a bit there."""
    options = {"model": f"tests.support.models:{name}", "scheme": "sl", "clients": 1}
    run = RunConfig(**options, optimizer_state="keep", batch_size=400)
    model = build(model_spec(run.model), (1, 28, 28), 10, seed=run.seed)
    dtypes = {n: t.dtype for n, t in model.state_dict().items()}
    assert len(set(dtypes.values())) == 2
    adam = torch.optim.Adam(model.parameters(), lr=run.lr, fused=True)
    for round_index in range(2):
        train_round(model, adam, data_of(run)[0], run, round_index, 0)
    expected = dict(model.state_dict())
    assert {n: t.dtype for n, t in expected.items()} == dtypes
    more = {"optimizer_state": "keep", "batch_size": 400, "cut": 2}
    assert_equal(
        joined(simulated_bn_dropout(tmp_path / "one", **options, **more)), expected, at_least=6
    )
    line = [part for n, v in (options | more).items() for part in (f"--{n.replace('_', '-')}", v)]
    allow = ["--allow-import", run.model]
    launcher.run(*line, "--rounds", 1, clients=1, client_options=allow)
    resumed = go_on(launcher, "--rounds", 2, clients=1, allow=allow)
    assert_equal(joined(resumed), expected, at_least=6)
