"""A part of the model: modes, random draws, gradients."""

import torch
from torch import nn

from sfl.config import RunConfig
from sfl.protocol import Position
from sfl.segment import Segment, train_step

AT = Position("r", 0, 0, 0)
CPU = torch.device("cpu")


def segment(*blocks: nn.Module, first_block: int = 1) -> Segment:
    made = Segment(nn.Sequential(*blocks), first_block, RunConfig(run="r"), CPU, boundary=1)
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
