"""Some samples of a data set: what partitions deal out and batches are drawn from."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Some rows of what is stored, gathered only when their pixels are needed.

    ``stored``: (M, C, H, W) uint8 or float32, often shared by the parts of a data set;
    ``y``: (N,) int64; ``writers``: (N,) int64, who made each sample, where that is known;
    ``rows``: (N,) int64, which rows of ``stored`` they are: all, in order, if not given.
    """

    stored: Tensor
    y: Tensor
    writers: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """(N, C, H, W), as stored; a copy if rows are given."""
        # Copies row by row; indexing goes pixel by pixel.
        return self.stored if self.rows is None else self.stored.index_select(0, self.rows)

    def take(self, indices: Tensor | slice) -> "Samples":
        """Return some of these samples; no pixel is copied."""
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        writers = None if self.writers is None else self.writers[indices]
        return Samples(self.stored, self.y[indices], writers, rows[indices])


@dataclass(frozen=True)
class Parts:
    """A client's own data, as its files divide them."""

    train: Samples
    validation: Samples | None  # None: to be held out of ``train``
    test: Samples
    classes: tuple[str, ...]


def nothing(shape: tuple[int, ...]) -> Samples:
    """Return no samples of a shape."""
    return Samples(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


def join(parts: Iterable[Samples]) -> Samples:
    """Return the samples of several parts in one."""
    xs, ys = zip(*((part.x, part.y) for part in parts), strict=True)
    alike = len({x.dtype for x in xs}) == 1
    return Samples(torch.cat(xs if alike else [as_floats(x) for x in xs]), torch.cat(ys))


def as_floats(x: Tensor) -> Tensor:
    """Return pixels as float32: bytes divided by 255, floats as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x
