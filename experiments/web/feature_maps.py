"""The maps that the activations at a cut were, if the model flattens them in front of it."""

from collections.abc import Sequence

import torch
from torch import nn

_IMAGES = 4  # dimensions of a batch of maps: (1, channels, height, width)


@torch.no_grad()
def map_shapes(
    model: nn.Module, cuts: Sequence[int], input_shape: Sequence[int]
) -> list[list[int]]:
    """Return for each cut (channels, height, width) of its activations, or else their own shape.

    ``model``: blocks in order; ``cuts``: the number of blocks in front of each cut.
    """
    z, maps = torch.zeros(1, *input_shape), torch.zeros(0)
    shapes = [[0]]
    for block in model.eval().children():
        z = block(z)
        if z.dim() == _IMAGES:
            maps = z
        shapes.append(list((maps if maps.numel() == z.numel() else z).shape[1:]))
    return [shapes[cut] for cut in cuts]
