"""SSIM: how alike two images are, from -1 to 1; 1 for equal ones.

Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
similarity", IEEE TIP 13(4), equation 13 and section III-C: a Gaussian window of 11 x 11 with a
standard deviation of 1.5, K1 = 0.01 and K2 = 0.03, averaged over all places where the window fits.
``page/similarity.js`` computes the same figure. Deviations: colours are averaged over the channels,
and in an image with a side below 11 the window has that side.
"""

import torch
from torch import Tensor
from torch.nn import functional

WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the similarity (B,) float64 of images (B, channels, height, width) in [0, 1]."""
    a, b = first.double(), second.double()
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a = _smooth(a * a) - mean_a**2
    var_b = _smooth(b * b) - mean_b**2
    both = _smooth(a * b) - mean_a * mean_b
    at = (2 * mean_a * mean_b + C1) * (2 * both + C2)
    at = at / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))
    return at.flatten(1).mean(1)


def _smooth(x: Tensor) -> Tensor:
    """Return the weighted mean around each place, (B, channels, height - 10, width - 10)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels, 1, height, width)
    down, across = _window(min(WINDOW, height)), _window(min(WINDOW, width))
    x = functional.conv2d(functional.conv2d(x, down.view(1, 1, -1, 1)), across.view(1, 1, 1, -1))
    return x.view(batch, channels, *x.shape[2:])


def _window(side: int) -> Tensor:
    """Return the weights (side,) of one direction; their sum is 1."""
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()
