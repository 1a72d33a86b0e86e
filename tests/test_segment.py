"""A part of the model: modes, random draws, gradients."""

from typing import Any

import torch
from torch import nn

from sfl.config import RunConfig
from sfl.protocol import Position
from sfl.segment import Segment, train_step

AT = Position("r", 0, 0, 0)
CPU = torch.device("cpu")


def segment(*blocks: nn.Module, first_block: int = 1, **more: Any) -> Segment:
    run = RunConfig(run="r", clip_norm=0.1, lr=0.1)
    made = Segment(nn.Sequential(*blocks), first_block, run, CPU, boundary=1, **more)
    made.start_round(0)
    return made


def test_parts_that_come_in_evaluation_mode_are_trained_from_the_first_step() -> None:
    norm = nn.BatchNorm1d(3).eval()
    segment(norm).forward(torch.randn(8, 3), AT)
    assert norm.training
    assert int(norm.num_batches_tracked) == 1


def test_what_is_hung_onto_a_module_draws_the_same_each_time() -> None:
    layer = nn.Linear(4, 64)
    layer.register_forward_hook(lambda module, given, out: nn.functional.dropout(out))
    ours, z = segment(layer), torch.randn(8, 4)
    first = ours.forward(z, AT)
    torch.rand(7)
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
