"""Random draws inside blocks, such as dropout: each block is seeded before it trains.

The seed derives from (seed, round, client, step, block). So draws do not depend on where the model
is cut, and a step can be computed again.
"""

import random

import numpy as np
import torch
from torch import nn

from sfl import seeds
from sfl.values import Position

# Modules without random draws. A block of only these needs no seed.
_DRAWS_NOTHING = frozenset(
    {
        nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm,
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh,
    }
)  # fmt: skip


def may_draw(block: nn.Module) -> bool:
    """Return whether a block may draw random numbers."""
    return any(map(_may_draw, block.modules()))


def _may_draw(module: nn.Module) -> bool:
    """Return whether a module itself may draw; hooks and a replaced ``forward`` may."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or type(module) not in _DRAWS_NOTHING


def seed_block(seed: int, at: Position, block: int, device: torch.device) -> None:
    """Seed all generators that a block may draw from; ``block``: its index in the whole model."""
    of_block = seeds.derive(seed, seeds.BLOCK, at.round, at.client, at.step, block)
    torch.default_generator.manual_seed(of_block)
    random.seed(of_block)  # a user's own block may use any of them
    np.random.seed(of_block % 2**32)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(of_block)
