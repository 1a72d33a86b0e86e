"""Modules that take less time give torch's bits, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfl.config import RunConfig
from sfl.fast_modules import MAX_LANES, MIN_LANES, MaxPool2d, speed_up
from sfl.models import lenet5
from sfl.protocol import Position
from sfl.segment import Segment, train_step

AT = Position("r", 0, 0, 0)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values with what is hard about maxima: ties, both zeros, infinities."""
    drawn = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=drawn, dtype=dtype).mul_(4).round_()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=dtype)
    at = torch.rand(shape, generator=drawn)
    return torch.where(at < 0.2, special[(at * 20).long().clamp(max=3)], x)


def bits(x: Tensor | None) -> Tensor:
    """Return a tensor's bytes: +0 and -0 differ, a NaN is itself."""
    assert x is not None
    return x.detach().contiguous().view(torch.uint8)


def pair(x: Tensor, *sizes: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """See that ours gives what torch's gives; return the two outputs."""
    theirs, ours = nn.MaxPool2d(*sizes, **how), MaxPool2d(*sizes, **how)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = theirs(one), ours(other)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(expected))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6)).to(x.dtype)
    expected.backward(grad)
    found.backward(grad.clone())
    assert torch.equal(bits(other.grad), bits(one.grad))
    return expected, found


def is_side_by_side(out: Tensor) -> bool:
    return out.grad_fn is not None and "SideBySide" in out.grad_fn.name()


@pytest.mark.parametrize(
    ("sizes", "how"),
    [((2,), {}), (((2, 3),), {}), ((3, 2), {"padding": 1}), ((3, 1), {}), (([2, 2], [2, 1]), {}),
     ((3, 2), {"ceil_mode": True}), ((2, 2), {"dilation": (2, 1)}), ((5, 1), {"padding": 2})],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(32, 6, 28, 28), (17, 6, 29, 28), (4, 64, 15, 13)])
def test_the_bits_are_torchs(
    shape: tuple[int, ...], sizes: tuple[Any, ...], how: dict[str, Any]
) -> None:
    assert is_side_by_side(pair(values(*shape), *sizes, **how)[1])
    assert is_side_by_side(pair(values(*shape, dtype=torch.float64), *sizes, **how)[1])


def test_what_is_not_a_number_goes_the_same_way() -> None:
    x = values(32, 6, 28, 28)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) < 0.1] = torch.nan
    expected, found = pair(x, 2)
    assert is_side_by_side(found)
    assert expected.isnan().any()


def test_a_gradient_that_is_not_contiguous_goes_the_same_way() -> None:
    x = values(32, 6, 28, 28)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    nn.MaxPool2d(2)(one).sum().backward()
    MaxPool2d(2)(other).sum().backward()
    assert torch.equal(bits(other.grad), bits(one.grad))


def test_it_is_differentiated_twice_as_torchs() -> None:
    found = []
    for pool in (nn.MaxPool2d(2), MaxPool2d(2)):
        x = values(32, 6, 28, 28).nan_to_num_(0, 1, -1).requires_grad_()
        (grad,) = torch.autograd.grad(pool(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.pow(2).sum(), x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "x",
    [
        values(MIN_LANES - 1, 1, 100, 100),  # fewer planes than it takes
        values(MAX_LANES + 5, 1, 28, 28),  # a prime
        values(4, 4, 8, 8),
        values(32, 28, 28),
        values(32, 6, 28, 28).bfloat16(),
        values(32, 6, 28, 28).to(memory_format=torch.channels_last),
        values(32, 6, 28, 56)[..., ::2],
    ],
    ids=["few", "prime", "small", "one", "bfloat16", "channels_last", "strided"],
)
def test_what_does_not_lie_in_planes_is_left_to_torch(x: Tensor) -> None:
    theirs, ours = nn.MaxPool2d(2)(x), MaxPool2d(2)(x.requires_grad_())
    assert not is_side_by_side(ours)
    assert torch.equal(bits(ours), bits(theirs))
    assert ours.stride() == theirs.stride()


def test_places_that_are_asked_for_are_torchs() -> None:
    x = values(32, 6, 28, 28)
    expected = nn.MaxPool2d(2, return_indices=True)(x)
    assert all(map(torch.equal, MaxPool2d(2, return_indices=True)(x), expected))


def test_torchs_modules_are_changed_and_no_others() -> None:
    class Own(nn.MaxPool2d):
        pass

    model = nn.Sequential(nn.Sequential(nn.MaxPool2d(2)), Own(2), nn.MaxPool1d(2))
    speed_up(model)
    assert [type(m) for m in model.modules()][2:] == [MaxPool2d, Own, nn.MaxPool1d]


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, given, out: None)
    return module


class Residual(nn.Module):
    """Takes what the first block of a row makes a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.row[0](x)
        positive: Tensor = self.row[1](out)
        return positive + out


def test_a_relu_works_in_place_where_nobody_else_gets_what_it_is_given() -> None:
    shared, residual = nn.ReLU(), Residual()
    rows: list[tuple[list[nn.Module], list[int]]] = [  # and where it does
        ([nn.Conv2d(1, 1, 3), nn.ReLU(), nn.ReLU()], [1]),
        ([nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()], [2, 4]),
        ([nn.ReLU(), nn.Sigmoid(), nn.ReLU()], []),
        ([nn.Linear(4, 4), shared, nn.Sigmoid(), shared], []),
        ([hooked(nn.Linear(4, 4)), nn.ReLU()], []),
        ([nn.Linear(4, 4), hooked(nn.ReLU())], []),
        ([nn.Linear(4, 4), nn.ReLU6()], []),
    ]
    speed_up(nn.Sequential(*(nn.Sequential(*row) for row, _ in rows), residual))
    for row, expected in rows:
        assert [i for i, module in enumerate(row) if getattr(module, "inplace", 0)] == expected
    assert not residual.row[1].inplace


@pytest.mark.parametrize(
    "before", [nn.Linear(6, 6), nn.Conv2d(3, 3, 1), nn.Conv1d(3, 3, 1),
               nn.BatchNorm2d(3), nn.BatchNorm1d(3)], ids=lambda module: type(module).__name__
)  # fmt: skip
def test_a_relu_in_place_gives_the_same_gradients(before: nn.Module) -> None:
    x = torch.randn((4, 3, 6, 6) if type(before).__name__.endswith("2d") else (4, 3, 6))
    models = [nn.Sequential(copy.deepcopy(before), nn.ReLU(), nn.Flatten()) for _ in range(2)]
    speed_up(models[1])
    assert [model[1].inplace for model in models] == [False, True]
    found = []
    for model in models:
        given = x.clone().requires_grad_()
        out = model(given)
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), [given, *model.parameters()])])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


def test_a_model_trains_to_the_bits_of_a_plain_loop() -> None:
    torch.manual_seed(1)
    plain = lenet5((1, 28, 28), 10)
    run, cpu = RunConfig(run="r", lr=0.01), torch.device("cpu")
    ours = Segment(copy.deepcopy(plain), 0, run, cpu, boundary=7)
    ours.start_round(0)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(3):
        x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
        loss = nn.functional.cross_entropy(plain(x), y)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        figures, _ = train_step(ours, x, y, AT)
        ours.update()
        assert figures.loss == loss.item()
    assert is_side_by_side(ours.blocks[:3](x))
    assert is_side_by_side(ours.blocks[:6](x))
    for parameter, other in zip(ours.blocks.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other)
