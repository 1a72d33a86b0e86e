"""Models and cuts: split computation equals whole computation."""

import pytest
import torch
from torch import nn

from experiments.support.costs import segments_of
from sfl.config import RunConfig
from sfl.errors import ConfigError, StepFailed
from sfl.model.segment import Segment, train_step
from sfl.model.topology import BACK, FRONT
from sfl.model.training import Training
from sfl.model.zoo import MODELS, build, model_spec, split
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from tests.support.models import bn_dropout
from tests.support.runs import BN_DROPOUT

CPU = torch.device("cpu")
X = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 9])


def back_of(run: RunConfig) -> Segment:
    return segments_of(SplitModel(Recipe.of(run), (1, 28, 28), 10), CPU)[BACK]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = build(MODELS[name], (1, 28, 28), 10, seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = build(MODELS[name], (1, 28, 28), 10, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build(MODELS[name], (1, 28, 28), 10, seed=4).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    drawn = [n for n in first if first[n].ndim > 1]  # the rest may begin as zeros or ones
    assert not any(torch.equal(first[n], other[n]) for n in drawn)


def test_a_models_function_leaves_the_default_dtype_alone() -> None:
    spec = model_spec("tests.support.odd_models:of_another_dtype")
    first, second = (build(spec, (1, 28, 28), 10, seed=0) for _ in range(2))
    assert torch.get_default_dtype() is torch.float32
    assert first[1].weight.dtype is second[1].weight.dtype is torch.float64


def test_the_models_are_the_fields() -> None:
    mlp, lenet = (build(MODELS[n], (1, 28, 28), 10, seed=0) for n in ("mlp", "lenet5"))
    assert [m.in_features for m in mlp if isinstance(m, nn.Linear)] == [784, 128, 64]
    assert sum(p.numel() for p in lenet.parameters()) == 61_706
    assert split(lenet, MODELS["lenet5"].cut)[0](X).shape == (6, 400)
    assert split(mlp, MODELS["mlp"].cut)[0](X).shape == (6, 128)


def test_segments_share_the_models_parameters_and_names() -> None:
    model = build(MODELS["lenet5"], (1, 28, 28), 10, seed=0)
    segments = split(model, 3, 7, 9)
    names = [name for segment in segments for name in segment.state_dict()]
    assert names == list(model.state_dict())
    assert segments[1][0] is model[3]


@pytest.mark.parametrize("cuts", [(13,), (-1,), (5, 3)])
def test_a_cut_outside_the_model_is_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="12 blocks"):
        split(build(MODELS["lenet5"], (1, 28, 28), 10, seed=0), *cuts)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_split_step_equals_the_unsplit_one(cut: int) -> None:
    """The front's gradients are those of the unsplit model, and its weights do change."""
    run = RunConfig(model=BN_DROPOUT, cut=cut, seed=5)
    at = Position("r", 2, 7, 1)
    cut_model = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    front, back = segments_of(cut_model, CPU).values()
    z = front.forward(X, at)
    figures, dz = train_step(back, z.detach().clone(), Y, at)
    front.backward(dz)
    whole = Segment(
        build(model_spec(run.model), (1, 28, 28), 10, seed=5), 0, Training.of(run, (cut,)), CPU
    )
    loss = nn.functional.cross_entropy(whole.forward(X, at), Y)
    loss.backward()
    assert loss.item() == figures.loss
    ours = [*front.blocks.named_parameters(), *back.blocks.named_parameters()]
    theirs = dict(whole.blocks.named_parameters())
    assert [name for name, _ in ours] == list(theirs)
    for name, parameter in ours:
        assert torch.equal(parameter.grad, theirs[name].grad), name
    before = front.state()
    front.update()
    changed = front.state()
    assert all(
        not torch.equal(before[name], changed[name]) for name, _ in front.blocks.named_parameters()
    )


def test_training_on_a_detached_copy_would_be_noticed() -> None:
    """The mistake that left the field's first fronts untrained."""
    front = segments_of(SplitModel(Recipe.of(RunConfig()), (1, 28, 28), 10), CPU)[FRONT]
    z = front.forward(X, Position()).detach().requires_grad_()
    z.backward(torch.ones_like(z))
    assert all(parameter.grad is None for parameter in front.blocks.parameters())
    front.backward(torch.ones_like(z))
    assert all(parameter.grad is not None for parameter in front.blocks.parameters())


def in_place_behind_a_view(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 5), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(1152, num_classes)
    )


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_in_place_modules_behind_a_view_train(cut: int) -> None:
    run = RunConfig(model="tests.test_models:in_place_behind_a_view", cut=cut)
    cut_model = SplitModel(Recipe.of(run), (1, 28, 28), 10)
    front, back = segments_of(cut_model, CPU).values()
    _, dz = train_step(back, front.forward(X, Position()).detach(), Y, Position())
    front.backward(dz)
    whole = build(model_spec(run.model), (1, 28, 28), 10, seed=0)
    nn.functional.cross_entropy(whole(X), Y).backward()
    assert torch.equal(front.blocks[0].weight.grad, whole[0].weight.grad)


def test_a_batch_that_a_block_cannot_train_on_is_one_clear_error() -> None:
    back = back_of(RunConfig(model=BN_DROPOUT, cut=6))
    with pytest.raises(StepFailed, match=r"block 6 \(BatchNorm1d\) cannot train on a batch of 1: "):
        back.forward(torch.zeros(1, 144), Position())


def test_in_place_modules_next_to_a_cut_work_on_a_copy() -> None:
    for cut in range(1, 12):
        front, back = split(bn_dropout((1, 28, 28), 10), cut)
        z = front.eval()(X)
        sent = z.clone()
        back.eval()(z)
        assert torch.equal(z, sent)
        assert all(not getattr(m, "inplace", False) for m in (front[-1], back[0]))


def test_dropout_depends_on_the_position_and_not_on_what_ran_before() -> None:
    back = back_of(RunConfig(model=BN_DROPOUT, cut=9))
    back.blocks[1] = nn.Identity()  # BatchNorm would move its buffers
    z = torch.randn(6, 32)
    first = back.forward(z, Position("r", 0, 0, 0))
    torch.rand(1)
    assert torch.equal(first, back.forward(z, Position("another name", 0, 0, 0)))
    for other in (Position("r", 1, 0, 0), Position("r", 0, 1, 0), Position("r", 0, 0, 1)):
        assert not torch.equal(first, back.forward(z, other))


def test_a_frozen_parameter_has_no_optimisers_state() -> None:
    back = back_of(RunConfig())
    back.blocks[0].requires_grad_(False)
    train_step(back, torch.randn(6, 400), Y, Position())
    back.update()
    assert back.optimizer.spec().keys() == back.optimizer.state().keys()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_optimisers_state_is_restored_exactly(optimizer: str) -> None:
    run = RunConfig(optimizer=optimizer, momentum=0.9, lr=0.01)
    ours, theirs = back_of(run), back_of(run)
    z = torch.randn(6, 400)
    for step in range(3):
        train_step(ours, z, Y, Position("r", 0, step))
        ours.update()
    theirs.load(ours.state())
    state = ours.optimizer.state()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in theirs.optimizer.spec().items()
    }
    theirs.optimizer.load(state)
    for segment in (ours, theirs):
        train_step(segment, z, Y, Position("r", 0, 3))
        segment.update()
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(s.state().values() for s in (ours, theirs)), strict=True)
    )


def not_a_sequential(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Linear(3, 3)


def two_outputs(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 2))


@pytest.mark.parametrize(
    ("options", "shape", "reason"),
    [
        ({"model": "tests.test_models:not_a_sequential", "cut": 1}, (1, 28, 28), "Sequential"),
        ({"model": "tests.test_models:two_outputs", "cut": 1}, (1, 28, 28), "wanted are 10 logits"),
        ({"model": "tests.test_models:two_outputs", "cut": 1}, (3, 9, 9), "does not take samples"),
        ({"model": "tests.test_models:two_outputs"}, (1, 28, 28), "say with --cut"),
        ({"model": "tests.test_models:nothing", "cut": 1}, (1, 28, 28), "cannot import"),
        ({"model": "lenet5"}, (784,), "cannot be built"),
        ({"model": "lenet5"}, (1, 4, 4), "does not take samples"),
        ({"model": "lenet5", "cut": 12}, (1, 28, 28), "blocks on both sides"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_run_is_refused(
    options: dict[str, object], shape: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        SplitModel(Recipe.of(RunConfig(**options)), shape, 10)


def test_a_server_cannot_choose_a_module_to_import() -> None:
    with pytest.raises(ConfigError, match="--allow-import os:system"):
        model_spec("os:system", allowed=[BN_DROPOUT])
    assert model_spec(BN_DROPOUT, allowed=[BN_DROPOUT]).cut is None
