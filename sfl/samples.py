"""Some samples of a data set: what partitions deal out and batches are drawn from."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfl.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Some rows of what is stored, gathered only when their pixels are needed.

    ``stored``: (M, C, H, W) uint8 or float32 in [0, 1], often shared by the parts of a data set;
    ``y``: (N,) int64; ``writers``: (N,) int64, who made each sample, where that is known;
    ``rows``: (N,) int64, which rows of ``stored`` they are: all, in order, if not given.
    ``shape``: (C, H, W), to which images are brought when they are gathered; (): as stored.
    """

    stored: Tensor
    y: Tensor
    writers: Tensor | None = None
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """(N, C, H, W), of the type that is stored; a copy if rows are given."""
        # Copies row by row; indexing goes pixel by pixel.
        x = self.stored if self.rows is None else self.stored.index_select(0, self.rows)
        return _resized(x, self.shape) if self.shape else x

    def take(self, indices: Tensor | slice) -> "Samples":
        """Return some of these samples; no pixel is copied."""
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        writers = None if self.writers is None else self.writers[indices]
        return Samples(self.stored, self.y[indices], writers, rows[indices], self.shape)

    def sized(self, shape: tuple[int, ...]) -> "Samples":
        """Return the same samples, whose images are brought to this shape; no pixel is copied.

        Raises:
            DataError: they are no images, and of another shape.
        """
        found = tuple(self.stored.shape[1:])
        if found == shape or not len(self):
            return self
        if len(shape) != 3:
            raise DataError(f"samples of shape {list(found)} cannot be made {list(shape)}")
        return dataclasses.replace(self, shape=shape)


def join(parts: Iterable[Samples]) -> Samples:
    """Return the samples of several parts in one."""
    xs, ys = zip(*((part.x, part.y) for part in parts), strict=True)
    alike = len({x.dtype for x in xs}) == 1
    return Samples(torch.cat(xs if alike else [as_floats(x) for x in xs]), torch.cat(ys))


def _resized(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return images brought to a shape, bilinearly; each is the same in any company."""
    from torchvision.transforms.v2 import functional  # takes seconds to import

    resized: Tensor = functional.resize(x, list(shape[1:]), antialias=True)
    return resized


def as_floats(x: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]; those that are, as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x
