"""Modules of torch that take less time with the same bits: ``speed_up``, and docs/performance.md.

Max-pooling: on the CPU torch pools a plane (H, W) value by value, but channels whose values lie
side by side (``torch.channels_last``) as many at once as a register holds. So planes are laid side
by side, pooled by that code of torch, and what comes out is laid back.

ReLU: in place, where it alone gets what a module made that does not look at it again.
"""

import functools
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

# So many planes side by side: more are slower to lay there, fewer to pool.
MIN_LANES, MAX_LANES = 8, 48
MIN_VALUES = 2**15  # of a batch with fewer torch's own way is as fast
# Modules whose gradients come from what they are given and from their weights alone.
_FORGET_THEIR_OUTPUT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
_DTYPES = (torch.float32, torch.float64)
_pool = torch.ops.aten.max_pool2d_with_indices.default
_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``, which pools a batch's planes side by side where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima of ``x``, (B, C, H, W), as torch's module does."""
        num_lanes = _lanes(x.shape[0] * x.shape[1]) if _is_usual(x) else 0
        out: Tensor
        if num_lanes and not self.return_indices:
            how = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
            out = _SideBySide.apply(x, num_lanes, how)
        else:
            out = super().forward(x)
        return out


def speed_up(blocks: nn.Sequential) -> None:
    """Let torch's own modules inside a row of blocks take less time."""
    modules = list(blocks.modules())
    for module in modules:
        if type(module) is nn.MaxPool2d:
            module.__class__ = MaxPool2d
    num_uses = Counter(child for module in modules for child in module._modules.values())
    _work_in_place(blocks, num_uses)


def _work_in_place(row: nn.Sequential, num_uses: Counter[nn.Module | None]) -> None:
    # A Sequential in another module is not looked at: that may take what one of its blocks makes.
    for before, block in itertools.pairwise(row):
        if type(block) is nn.ReLU and type(before) in _FORGET_THEIR_OUTPUT:
            is_hooked = is_hung_onto(before) or is_hung_onto(block)
            block.inplace = block.inplace or (num_uses[block] == 1 and not is_hooked)
    for block in row:
        if type(block) is nn.Sequential:
            _work_in_place(block, num_uses)


def is_hung_onto(module: nn.Module) -> bool:
    """Say whether a user has hung something of their own onto a module."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _is_usual(x: Tensor) -> bool:
    is_plain = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous()
    return is_plain and x.dtype in _DTYPES and x.numel() >= MIN_VALUES


@functools.lru_cache
def _lanes(num_planes: int) -> int:
    """Return how many planes of so many to lay side by side at a time; 0: they do not divide."""
    numbers = range(min(MAX_LANES, num_planes), MIN_LANES - 1, -1)
    return next((n for n in numbers if num_planes % n == 0), 0)


class _SideBySide(torch.autograd.Function):
    """Pool ``num_lanes`` planes at a time; ``how``: what torch's operations are told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_lanes: int, how: tuple[Any, ...]) -> Tensor:
        batch, channels, height, width = x.shape
        planes = x.view(-1, num_lanes, height, width).contiguous(memory_format=torch.channels_last)
        pooled, places = _pool(planes, *how)
        shape = batch, channels, pooled.shape[2], pooled.shape[3]
        ctx.save_for_backward(x, places.reshape(shape))
        ctx.how = how
        out: Tensor = pooled.reshape(shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, places = ctx.saved_tensors
        return _pool_backward(grad, x, *ctx.how, places), None, None
