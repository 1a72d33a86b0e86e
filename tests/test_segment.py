"""A part of the model: modes, random draws, gradients."""

import random

import numpy as np
import torch
from torch import nn

from sfl.config import RunConfig
from sfl.model.segment import Segment, train_step
from sfl.model.training import Training
from sfl.values import Position

AT = Position("r", 0, 0, 0)
CPU = torch.device("cpu")


def segment(*blocks: nn.Module, first_block: int = 1) -> Segment:
    run = RunConfig(run="r", clip_norm=0.1, lr=0.1)
    made = Segment(nn.Sequential(*blocks), first_block, Training.of(run, (1,)), CPU)
    made.start_round(0)
    return made


class FreezesItsNorm(nn.Module):
    """Keeps its BatchNorm in evaluation mode, as torch's users do it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_modules_are_trained_and_evaluated_in_the_mode_that_they_came_in() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    frozen[1].train()
    usual, own = nn.BatchNorm1d(3), FreezesItsNorm()
    ours, norms = segment(frozen, usual, own), (frozen[0], frozen[1], usual, own.norm)
    for _ in range(2):
        ours.forward(torch.randn(8, 3), AT)
        assert [norm.training for norm in norms] == [False, True, True, False]
        ours.evaluate(torch.randn(8, 3))
        assert not any(module.training for module in ours.blocks.modules())
    assert [int(norm.num_batches_tracked) for norm in norms] == [0, 2, 2, 0]


def test_a_step_is_undone_until_its_update_and_no_step_before_it() -> None:
    """Whoever waits for the next step's input has nothing to undo."""
    ours = segment(nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = ours.state()
    ours.undo_step()
    ours.forward(torch.randn(8, 3), AT)
    ours.undo_step()
    assert all(torch.equal(t, before[n]) for n, t in ours.state().items())
    ours.forward(torch.randn(8, 3), AT)
    ours.backward(torch.randn(8, 2))
    ours.update()
    after = ours.state()
    ours.undo_step()
    assert all(torch.equal(t, after[n]) for n, t in ours.state().items())
    assert int(after["0.num_batches_tracked"]) == 1


def test_frozen_weights_stay_when_gradients_are_set() -> None:
    layers = nn.Linear(4, 6), nn.Linear(6, 3)
    layers[0].requires_grad_(False)
    run = RunConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.1)
    ours = Segment(nn.Sequential(*layers), 0, Training.of(run, (1,)), CPU)
    before = ours.state()
    for _ in range(2):
        train_step(ours, torch.randn(8, 4), torch.randint(3, (8,)), AT)
        ours.set_gradients(ours.gradients())
        ours.update()
    after = ours.state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"1.weight", "1.bias"} == ours.gradients().keys() == ours.parameters().keys()


def test_a_parameter_on_both_sides_of_the_boundary_is_clipped_once() -> None:
    layer = nn.Linear(4, 4)
    ours = segment(layer, nn.ReLU(), layer, first_block=0)
    assert [len(half) for half in ours.optimizer.sides()] == [2]


def test_a_users_modules_stay_what_they_are() -> None:
    given = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)]
    ours = segment(*given)
    assert list(ours.blocks) == given
    assert [type(module) for module in given] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert not given[1].inplace


def test_what_is_hung_onto_a_module_draws_the_same_each_time() -> None:
    layer = nn.Linear(4, 64)
    layer.register_forward_hook(lambda module, given, out: nn.functional.dropout(out))
    ours, z = segment(layer), torch.randn(8, 4)
    first = ours.forward(z, AT)
    torch.rand(7)
    assert torch.equal(ours.forward(z, AT), first)


class _Drawing(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * (random.random() + float(np.random.rand()))


def test_a_block_that_draws_from_pythons_generators_draws_the_same_each_time() -> None:
    ours, z = segment(_Drawing()), torch.randn(8, 4)
    first = ours.forward(z, AT)
    random.random()
    np.random.rand()
    assert torch.equal(ours.forward(z, AT), first)


def test_dropout_draws_the_same_each_time() -> None:
    ours, z = segment(nn.Linear(4, 64), nn.Dropout(0.5)), torch.randn(8, 4)
    first = ours.forward(z, AT)
    torch.rand(7)
    assert torch.equal(ours.forward(z, AT), first)


def test_the_gradients_are_those_of_a_plain_loop() -> None:
    z, y = torch.randn(8, 4), torch.randint(3, (8,))
    ours = segment(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    theirs = z.clone().requires_grad_()
    loss = nn.functional.cross_entropy(ours.blocks(theirs), y)
    expected = torch.autograd.grad(loss, [theirs, *ours.blocks.parameters()])
    figures, grads = train_step(ours, z, y, AT)
    found = [grads, *(parameter.grad for parameter in ours.blocks.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert figures.loss == loss.item()


def linear() -> list[nn.Module]:
    return [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)]


def in_place() -> list[nn.Module]:
    return [nn.ReLU(inplace=True), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)]


def with_norm() -> list[nn.Module]:
    return [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)]


def nested() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)]


def shared() -> list[nn.Module]:
    layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
    layers[1].weight = layers[0].weight
    return [layers[0], nn.ReLU(), *layers[1:]]


def twice() -> list[nn.Module]:
    layer = nn.Linear(4, 4)
    return [layer, nn.ReLU(), layer, nn.Linear(4, 3)]


def frozen() -> list[nn.Module]:
    half = nn.Linear(6, 5)
    half.weight.requires_grad_(False)
    return [nn.Linear(4, 6).requires_grad_(False), nn.ReLU(), half, nn.Linear(5, 3)]


def hung_onto() -> list[nn.Module]:
    layer = nn.Linear(4, 6)
    layer.register_full_backward_hook(lambda module, given, got: (2 * given[0],))
    return [layer, nn.ReLU(), nn.Linear(6, 3)]


class Doubling(nn.Module):
    """Looks at the gradients of what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(lambda grad: 2 * grad)
        return x.relu()


def own() -> list[nn.Module]:
    return [nn.Linear(4, 6), Doubling(), nn.Linear(6, 3)]
