"""The front's forward pass and gradient step as ONNX graphs, with the parameters as inputs.

A page computes with them on a runtime that only infers::

    forward:  x (B, *input), parameters            ->  z (B, *cut)
    step:     x (B, *input), dz (B, *cut), parameters  ->  the parameters' gradients, in order

The step is the chain rule, written out for each kind of block; all is float32, B is any number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfl.errors import ConfigError, RunError, reason_of
from sfl.trained.kinds import check_onnx_installed, exporter_alone, onnx_session

MOST_DIFFERENCE: Final = 2e-5  # of a gradient from torch's, relative to the largest
_BATCHES: Final = (1, 3, 32)
Gradients = list[Tensor]


@dataclass(frozen=True)
class Rule:
    """How one kind of block computes, and what it gives back.

    ``forward(block, parameters, x)`` returns its output. ``backward(block, parameters, x, out,
    dout, to_x)`` returns its parameters' gradients, and its input's; None unless ``to_x``.
    ``fits``: whether a block of this kind is one that they are right for.
    """

    forward: Callable[[Any, Sequence[Tensor], Tensor], Tensor]
    backward: Callable[..., tuple[Gradients, Tensor | None]]
    fits: Callable[[Any], bool] = lambda block: True


def _linear(block: nn.Linear, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return functional.linear(x, *parameters)


def _linear_back(
    block: nn.Linear, parameters: Sequence[Tensor], x: Tensor, out: Tensor, dout: Tensor, to_x: bool
) -> tuple[Gradients, Tensor | None]:
    dx = dout @ parameters[0] if to_x else None
    return [dout.t() @ x, dout.sum(0)][: len(parameters)], dx


def _conv(block: nn.Conv2d, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return functional.conv2d(x, *parameters, padding=block.padding)


def _conv_back(
    block: nn.Conv2d, parameters: Sequence[Tensor], x: Tensor, out: Tensor, dout: Tensor, to_x: bool
) -> tuple[Gradients, Tensor | None]:
    # The samples take the place of the channels: each element of the kernel sums over them.
    to_weight = functional.conv2d(x.transpose(0, 1), dout.transpose(0, 1), padding=block.padding)
    grads = [to_weight.transpose(0, 1), dout.sum((0, 2, 3))][: len(parameters)]
    dx = functional.conv_transpose2d(dout, parameters[0], padding=block.padding) if to_x else None  # type: ignore[arg-type]
    return grads, dx


def _conv_fits(block: nn.Conv2d) -> bool:
    plain = block.stride == block.dilation == (1, 1) and block.groups == 1
    return plain and block.padding_mode == "zeros" and not isinstance(block.padding, str)


def _pool(block: nn.MaxPool2d, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return functional.max_pool2d(x, block.kernel_size)


def _pool_back(
    block: nn.MaxPool2d,
    parameters: Sequence[Tensor],
    x: Tensor,
    out: Tensor,
    dout: Tensor,
    to_x: bool,
) -> tuple[Gradients, Tensor | None]:
    if not to_x:
        return [], None
    side = int(block.kernel_size)
    channels, height, width = out.shape[1:]
    inside = x[:, :, : height * side, : width * side]
    windows = inside.reshape(-1, channels, height, side, width, side).transpose(3, 4)
    # Of equal values, which an empty background gives, the first counts, as in torch.
    largest = windows.reshape(-1, channels, height, width, side * side).argmax(-1, keepdim=True)
    chosen = largest == torch.arange(side * side)
    spread = (chosen.to(dout.dtype) * dout.unsqueeze(-1)).reshape(windows.shape)
    back = spread.transpose(3, 4).reshape(-1, channels, height * side, width * side)
    return [], functional.pad(back, (0, x.shape[3] - width * side, 0, x.shape[2] - height * side))


def _pool_fits(block: nn.MaxPool2d) -> bool:
    side = block.kernel_size
    plain = isinstance(side, int) and block.stride == side and block.dilation == 1
    return plain and block.padding == 0 and not (block.ceil_mode or block.return_indices)


def _relu(block: nn.ReLU, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return functional.relu(x)


def _relu_back(
    block: nn.ReLU, parameters: Sequence[Tensor], x: Tensor, out: Tensor, dout: Tensor, to_x: bool
) -> tuple[Gradients, Tensor | None]:
    return [], dout * (out > 0).to(dout.dtype)


def _flatten(block: nn.Flatten, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return x.flatten(1)


def _flatten_back(
    block: nn.Flatten,
    parameters: Sequence[Tensor],
    x: Tensor,
    out: Tensor,
    dout: Tensor,
    to_x: bool,
) -> tuple[Gradients, Tensor | None]:
    return [], dout.reshape(-1, *x.shape[1:])


RULES: Final[dict[type[nn.Module], Rule]] = {
    nn.Linear: Rule(_linear, _linear_back),
    nn.Conv2d: Rule(_conv, _conv_back, _conv_fits),
    nn.MaxPool2d: Rule(_pool, _pool_back, _pool_fits),
    nn.ReLU: Rule(_relu, _relu_back),
    nn.Flatten: Rule(_flatten, _flatten_back, lambda b: (b.start_dim, b.end_dim) == (1, -1)),
}


def why_not(front: nn.Sequential) -> str:
    """Return why a page cannot train these blocks; "" if it can."""
    for name, block in front.named_children():
        rule = RULES.get(type(block))
        if not rule or not rule.fits(block):
            return f"block {name}, {block}, has no gradient there"
    return "" if list(front.parameters()) else "the front has no weights"


class Forward(nn.Module):
    """z (B, *cut) of x (B, *input)."""

    def __init__(self, front: nn.Sequential) -> None:
        super().__init__()
        self.blocks = [(block, len(list(block.parameters()))) for block in front]

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return self.passed(x, parameters)[-1]

    def passed(self, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the input, and each block's output."""
        passed = [x]
        for (block, _), own in zip(self.blocks, self.shared_out(parameters), strict=True):
            passed.append(RULES[type(block)].forward(block, own, passed[-1]))
        return passed

    def shared_out(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yield each block's parameters."""
        start = 0
        for _, count in self.blocks:
            yield parameters[start : start + count]
            start += count


class Step(Forward):
    """The parameters' gradients for x (B, *input) and dz (B, *cut)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, dz: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        passed, owns = self.passed(x, parameters), list(self.shared_out(parameters))
        first = next(i for i, (_, count) in enumerate(self.blocks) if count)
        grads: Gradients = []
        dout: Tensor | None = dz
        for i in range(len(self.blocks) - 1, first - 1, -1):
            block, _ = self.blocks[i]
            back = RULES[type(block)].backward
            assert dout is not None
            own, dout = back(block, owns[i], passed[i], passed[i + 1], dout, i > first)
            grads = [*own, *grads]
        return tuple(grads)


@dataclass(frozen=True)
class Graphs:
    """Both as ONNX files. Their inputs: ``x``, ``dz`` for the step, then the parameters' names."""

    forward: bytes
    step: bytes
    worst: float  # difference from torch that was seen, relative to the largest value


def step_graphs(front: nn.Sequential, input_shape: Sequence[int]) -> Graphs:
    """Return the graphs of a front, after comparing them with torch.

    Raises:
        ConfigError: a block has no rule, or a package is missing.
        RunError: the exporter fails, or the graphs compute something else.
    """
    if why := why_not(front):
        raise ConfigError(f"a page cannot train this front: {why}")
    check_onnx_installed()
    names = [name for name, _ in front.named_parameters()]
    parameters = [p.detach().clone() for p in front.parameters()]
    x = torch.rand(2, *input_shape)
    with torch.no_grad():
        dz = front(x)
    grads = [f"d_{name}" for name in names]
    try:
        forward = _exported(Forward(front), (x, parameters), ["x", *names], ["z"])
        step = _exported(Step(front), (x, dz, parameters), ["x", "dz", *names], grads)
        found = [_difference(front, forward, step, input_shape, size) for size in _BATCHES]
        worst = float(torch.tensor(found).max())
    except Exception as error:  # torch and onnxruntime raise dozens of types
        raise RunError(f"the front cannot be made a graph for pages: {reason_of(error)}") from error
    if not worst <= MOST_DIFFERENCE:  # NaN is refused as well
        raise RunError(f"the front's graph for pages is {worst:.1e} off torch's gradients")
    return Graphs(forward, step, worst)


def _exported(
    module: nn.Module, inputs: tuple[Any, ...], names: list[str], outputs: list[str]
) -> bytes:
    batch = {0: torch.export.Dim("batch", min=1)}
    *batched, parameters = inputs
    with exporter_alone():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=(*[batch] * len(batched), [None] * len(parameters)),
            input_names=names,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _difference(
    front: nn.Sequential, forward: bytes, step: bytes, input_shape: Sequence[int], size: int
) -> float:
    """Return how far the graphs are from torch on two batches of a size.

    In one of them all is a whole number, so that pools find equal values in different places.
    """
    drawn = torch.Generator().manual_seed(size)
    weights = {name: p.detach() for name, p in front.named_parameters()}
    whole = {n: torch.randint(-1, 2, p.shape, generator=drawn).float() for n, p in weights.items()}
    x = torch.rand(size, *input_shape, generator=drawn) - 0.5
    differences = []
    for parameters, inputs in ((weights, x), (whole, (x > 0).float())):
        own = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        z = torch.func.functional_call(front, own, (inputs,))
        dz = torch.randn(z.shape, generator=drawn)
        wanted = [z.detach(), *torch.autograd.grad(z, list(own.values()), dz)]
        given = {name: p.numpy() for name, p in parameters.items()} | {"x": inputs.numpy()}
        found = [
            *onnx_session(forward).run(None, given),
            *onnx_session(step).run(None, given | {"dz": dz.numpy()}),
        ]
        for ours, got in zip(wanted, map(torch.from_numpy, found), strict=True):
            differences.append((ours - got).abs().max() / ours.abs().max().clamp(min=1e-6))
    return float(torch.stack(differences).max())  # NaN if one is
