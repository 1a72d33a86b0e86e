"""Augmentation: random changes to the images of a training batch.

Each sample's draws derive from (seed, client, round, step) and its place in the step. So a step can
be repeated, and the images do not depend on where the model is cut or on the transport. Images are
(B, C, H, W) float32 in [0, 1], before normalisation; pixels from outside an image get the data
set's background.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from sfl import seeds
from sfl.registry import with_options
from sfl.values import Position

NONE = "none"
MOST_PADDING = 64  # pixels


def _flip(x: Tensor, dimension: int, drawn: Generator) -> Tensor:
    flipped = torch.rand(len(x), generator=drawn) < 0.5
    return torch.where(flipped.reshape(-1, 1, 1, 1), x.flip(dimension), x)


def hflip(x: Tensor, drawn: Generator, background: float) -> Tensor:
    """Mirror an image left to right with probability 1/2."""
    return _flip(x, 3, drawn)


def vflip(x: Tensor, drawn: Generator, background: float) -> Tensor:
    """Mirror an image top to bottom with probability 1/2."""
    return _flip(x, 2, drawn)


def crop(x: Tensor, drawn: Generator, background: float, *, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels each way: pad, and crop to the old size.

    He et al. 2016 (arXiv 1512.03385), Section 4.2.
    """
    if not 1 <= padding <= MOST_PADDING:
        raise ValueError(f"padding must be from 1 to {MOST_PADDING}")
    count, channels, height, width = x.shape
    padded = nn.functional.pad(x, [padding] * 4, value=background)
    offsets = torch.randint(2 * padding + 1, (count, 2), generator=drawn)
    rows = offsets[:, 0, None] + torch.arange(height)  # (B, H)
    columns = offsets[:, 1, None] + torch.arange(width)  # (B, W)
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def rotate(x: Tensor, drawn: Generator, background: float, *, degrees: float = 10.0) -> Tensor:
    """Rotate each image about its centre by up to ``degrees`` each way, bilinearly."""
    if not 0 < degrees <= 180:
        raise ValueError("degrees must be in (0, 180]")
    angles = (2 * torch.rand(len(x), generator=drawn) - 1) * math.radians(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(x))
    aspect = x.shape[3] / x.shape[2]  # the grid's axes both go from -1 to 1
    theta = torch.stack([cos, -sin / aspect, zero, sin * aspect, cos, zero], 1).reshape(-1, 2, 3)
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x - background, grid, align_corners=False) + background


Change = Callable[..., Tensor]  # (images, random draws, background) -> images
# Further options are keyword-only.
AUGMENTATIONS: dict[str, Change] = {
    "hflip": hflip,
    "vflip": vflip,
    "crop": crop,
    "rotate": rotate,
}


@torch.no_grad()
def augment(
    x: Tensor, changes: Sequence[Change], background: float, *, seed: int, at: Position
) -> Tensor:
    """Return a training batch's images changed at random, by one change after the other."""
    for index, change in enumerate(changes):
        drawn = seeds.generator(seed, seeds.AUGMENTATION, at.round, at.client, at.step, index)
        x = change(x, drawn, background)
    return x


def changes_of(text: str) -> tuple[Change, ...]:
    """Return the changes that a text like ``hflip+crop:padding=4`` names.

    Raises:
        ConfigError: it names none such, or one does not take such a value.
    """
    names = [] if text == NONE else text.split("+")
    changes = tuple(with_options("augment", name, AUGMENTATIONS) for name in names)
    for change in changes:
        change(torch.zeros(1, 1, 4, 4), torch.Generator(), 0.0)
    return changes
