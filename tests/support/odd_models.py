"""Models that are unusual or wrong, each in one way: ``tests.support.odd_models:<function>``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, ...]


class Apply(nn.Module):
    """A block of one function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def around(*blocks: nn.Module) -> nn.Sequential:
    """Return blocks 2, 3, ... of a row, between linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), *blocks, nn.Linear(32, 10))


# Weights on both sides of a cut


def tied(shape: Shape, classes: int) -> nn.Sequential:
    again = nn.Linear(32, 32)
    return around(again, nn.ReLU(), again)


def tied_by_a_view(shape: Shape, classes: int) -> nn.Sequential:
    one, other = nn.Linear(32, 32), nn.Linear(32, 32)
    other.weight = nn.Parameter(one.weight.data.t())
    return around(one, nn.ReLU(), other)


def side_by_side(shape: Shape, classes: int) -> nn.Sequential:
    """Two weights in one storage that have no element in common."""
    one, other, flat = nn.Linear(32, 32), nn.Linear(32, 32), torch.randn(2048) / 8
    one.weight = nn.Parameter(flat[:1024].view(32, 32))
    other.weight = nn.Parameter(flat[1024:].view(32, 32))
    return around(one, nn.ReLU(), other)


class Scale(nn.Module):
    def __init__(self, scale: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def tied_buffer(shape: Shape, classes: int) -> nn.Sequential:
    scale = torch.ones(32)
    return around(Scale(scale, persistent=False), nn.ReLU(), Scale(scale, persistent=False))


class Hidden(nn.Module):
    """Uses the weights of a layer that is not registered."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.layer[0].weight.t())


def tied_in_a_list(shape: Shape, classes: int) -> nn.Sequential:
    layer = nn.Linear(32, 32)
    return around(layer, nn.ReLU(), Hidden(layer))


def tied_in_a_function(shape: Shape, classes: int) -> nn.Sequential:
    layer = nn.Linear(32, 32)
    use = Apply(lambda x: functional.linear(x, layer.weight.t()))
    return around(layer, nn.ReLU(), use)


# Rows with something of their own


class OwnInit(nn.Sequential):
    """A row with no more of its own than names: harmless."""

    depth = 3

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, classes))
        self.classes = classes

    def __repr__(self) -> str:
        return "OwnInit"

    def num_weights(self) -> int:
        return sum(p.numel() for p in self.parameters())


def own_init(shape: Shape, classes: int) -> nn.Sequential:
    return OwnInit(classes)


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnCall(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class OwnTrain(nn.Sequential):
    def train(self, mode: bool = True) -> nn.Sequential:
        super().train(mode)
        return self


def own_forward(shape: Shape, classes: int) -> nn.Sequential:
    return OwnForward(*around(nn.ReLU()))


def own_call(shape: Shape, classes: int) -> nn.Sequential:
    return OwnCall(*around(nn.ReLU()))


def own_train(shape: Shape, classes: int) -> nn.Sequential:
    return OwnTrain(*around(nn.ReLU()))


def own_forward_on_the_object(shape: Shape, classes: int) -> nn.Sequential:
    model = around(nn.ReLU())
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


def own_hook(shape: Shape, classes: int) -> nn.Sequential:
    model = around(nn.ReLU())
    model.register_forward_hook(lambda module, given, out: 2 * out)
    return model


def own_parameter(shape: Shape, classes: int) -> nn.Sequential:
    model = around(nn.ReLU())
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def own_buffer(shape: Shape, classes: int) -> nn.Sequential:
    model = around(nn.ReLU())
    model.register_buffer("scale", torch.ones(1))
    return model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(2704, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


def plain_module(shape: Shape, classes: int) -> nn.Module:
    return Plain()


def fails(shape: Shape, classes: int) -> nn.Sequential:
    return {}["no such layer"]


def lazy(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, classes))


def complex_weights(shape: Shape, classes: int) -> nn.Sequential:
    block = Scale(torch.ones(32, dtype=torch.complex64))
    return around(block, Apply(torch.real))


# What passes from block to block


class Recurrent(nn.Module):
    """Puts time first, as torch's layers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(28, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.squeeze(1).transpose(0, 1))[0]


def time_first(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(Recurrent(), Apply(lambda x: x[-1]), nn.Linear(32, classes))


def four_of_each(shape: Shape, classes: int) -> nn.Sequential:
    split = Apply(lambda x: x.reshape(-1, 8))
    return around(split, nn.ReLU(), Apply(lambda x: x.reshape(-1, 32)))


def squeezed(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(*around(nn.ReLU()), Apply(torch.squeeze))


def pairs(shape: Shape, classes: int) -> nn.Sequential:
    """Takes batches of one or of an even size."""
    halves = Apply(lambda x: x if len(x) == 1 else x.view(len(x) // 2, 2, 32).reshape(-1, 32))
    return around(nn.ReLU(), halves)


class ByBatch(nn.Module):
    """Gives as many columns as there are samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : len(x)]


def columns_by_batch(shape: Shape, classes: int) -> nn.Sequential:
    return around(ByBatch(), Apply(lambda x: x.sum(1, keepdim=True).expand(-1, 32)))


def two_tensors(shape: Shape, classes: int) -> nn.Sequential:
    """A residual around the cut."""
    return around(Apply(lambda x: (x, x.relu())), Apply(lambda both: both[0] + both[1]))


def named_tensors(shape: Shape, classes: int) -> nn.Sequential:
    return around(Apply(lambda x: {"a": x, "b": x.relu()}), Apply(lambda z: z["a"] + z["b"]))


class Auxiliary(nn.Module):
    """Gives a tuple in training."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (x, x) if self.training else x


def auxiliary(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(*around(nn.ReLU()), Auxiliary())


def complex_numbers(shape: Shape, classes: int) -> nn.Sequential:
    return around(Apply(lambda x: x.to(torch.complex64)), Apply(torch.real))


def whole_numbers(shape: Shape, classes: int) -> nn.Sequential:
    return around(Apply(lambda x: (10 * x).long()), Apply(lambda x: x.float()))


def eight_bits(shape: Shape, classes: int) -> nn.Sequential:
    return around(Apply(lambda x: x.to(torch.float8_e5m2)), Apply(lambda x: x.float()))


def bfloat16(shape: Shape, classes: int) -> nn.Sequential:
    layer = nn.Linear(32, 32).bfloat16()
    return around(Apply(lambda x: x.bfloat16()), layer, nn.ReLU(), Apply(lambda x: x.float()))


class Store(nn.Module):
    """Keeps what it is given, for ``Add``."""

    def __init__(self, place: dict[str, Tensor]) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        self.place["x"] = x
        return x


class Add(nn.Module):
    def __init__(self, place: dict[str, Tensor], *, needs_it: bool) -> None:
        super().__init__()
        self.place, self.needs_it = place, needs_it

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.place["x"] if self.needs_it else self.place.get("x", 0))


def stored(shape: Shape, classes: int) -> nn.Sequential:
    place: dict[str, Tensor] = {}
    return around(Store(place), nn.ReLU(), Add(place, needs_it=True))


def stored_if_there(shape: Shape, classes: int) -> nn.Sequential:
    """Behind a cut it silently becomes another model."""
    place: dict[str, Tensor] = {}
    return around(Store(place), nn.ReLU(), Add(place, needs_it=False))


# What a block keeps


class Keeps(nn.Module):
    """Keeps its state between calls, as for a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.GRU(28, 32, batch_first=True), None

    def forward(self, x: Tensor) -> Tensor:
        out, self.state = self.layer(x.squeeze(1), self.state)
        return out[:, -1]


def sparse(shape: Shape, classes: int) -> nn.Sequential:
    words = nn.Embedding(2, 16, sparse=True)
    look_up = nn.Sequential(Apply(lambda x: (x > 0).long()), words, nn.Flatten())
    return nn.Sequential(nn.Flatten(), look_up, nn.Linear(784 * 16, classes))


def of_another_dtype(shape: Shape, classes: int) -> nn.Sequential:
    torch.set_default_dtype(torch.float64)
    return around()


def keeps(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(Keeps(), nn.ReLU(), nn.Linear(32, classes))


class Counts(nn.Module):
    """Counts its steps in training: in a buffer that is kept, or not."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()), persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x / (1 + self.steps)


def counts(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Counts(persistent=False))


def counts_in_a_buffer(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Counts(persistent=True))


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean(0)
        return x


def grows(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Grows())


# What raises, or lets no gradient through


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nothing if self.training else x


def raises(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Raises())


def opens_a_file(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Apply(lambda x: open("/nowhere/weights")))


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise IndexError("no way back")


def raises_backward(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), nn.Identity(), Apply(NoWayBack.apply))


def detaches(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), nn.Identity(), Apply(torch.Tensor.detach))


def not_copied(shape: Shape, classes: int) -> nn.Sequential:
    block = nn.Identity()
    block.twice = nn.Parameter(torch.ones(1)) * 2
    return around(nn.ReLU(), block)


# What has to work


def norm_over_one_pixel(shape: Shape, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, classes)
    )


def frozen(shape: Shape, classes: int) -> nn.Sequential:
    """A frozen front in eval(), a frozen float64 scale behind, and a layer that is used twice."""
    front = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(0.5))
    nn.init.normal_(front[1].running_mean)
    front.requires_grad_(False).eval()
    again, scale = nn.Linear(16, 16), nn.Linear(16, 16, dtype=torch.float64).requires_grad_(False)
    back = [nn.Linear(4 * 13 * 13, 16), again, nn.ReLU(), again, nn.BatchNorm1d(16)]
    back += [Apply(torch.Tensor.double), scale, Apply(torch.Tensor.float), nn.Linear(16, classes)]
    return nn.Sequential(*front, nn.Flatten(), *back)


def frozen_back(shape: Shape, classes: int) -> nn.Sequential:
    model = around(nn.ReLU(), nn.BatchNorm1d(32))
    model[3:].requires_grad_(False)
    return model


def all_in_eval(shape: Shape, classes: int) -> nn.Sequential:
    return norm_over_one_pixel(shape, classes).eval()


# Operations without a deterministic form, in blocks 2 and 3


class _NoOrder(torch.autograd.Function):
    """Fails in its backward pass as torch does where a GPU sums in no fixed order."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "made_up_backward_cuda does not have a deterministic implementation, but you set"
                " 'torch.use_deterministic_algorithms(True)'. You can turn off determinism ..."
            )
        return grads[0]


def no_order_backward(shape: Shape, classes: int) -> nn.Sequential:
    return around(nn.ReLU(), Apply(_NoOrder.apply))


def no_order(shape: Shape, classes: int) -> nn.Sequential:
    index = torch.zeros(1, dtype=torch.int64)
    return around(Apply(lambda z: z.clone().put_(index, z.detach()[0, :1])), nn.ReLU())
