"""``Samples``: rows of a stored data set."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfl.errors import DataError

Columns = Mapping[str, tuple[str, ...]]  # the classes of further columns of labels, by name
SHORTEST_SIDE = 4  # of an image that may be resized; smaller ones are taken for rows of numbers


def check_resizable(found: Sequence[int], shape: Sequence[int]) -> None:
    """Check that samples are images that can be resized to a shape.

    Raises:
        DataError: they are not.
    """
    if not len(found) == len(shape) == 3 or min(found[1:]) < SHORTEST_SIDE:
        raise DataError(
            f"samples of shape {list(found)} are no images that could be resized to the data set's"
            f" {list(shape)}: give the run a data set of this kind"
        )


@dataclass(frozen=True)
class Samples:
    """Some rows of a stored data set, whose pixels are gathered only when needed.

    stored   (M, C, H, W) uint8 or float32, often shared by the parts of a data set
    y        (N,) int64, the labels
    writers  (N,) int64, who made each sample, if known
    rows     (N,) int64, the rows of ``stored``; None: all, in order
    shape    (C, H, W), to which images are resized when gathered; (): as stored
    columns  of the last dimension, that a sample has; None: all
    further  (N,) int64 each, by name: further columns of labels
    """

    stored: Tensor
    y: Tensor
    writers: Tensor | None = None
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()
    columns: slice | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> Tensor:
        """The samples: (N, C, H, W) of the stored dtype; a copy if ``rows`` is given."""
        # index_select copies whole rows; indexing goes pixel by pixel.
        x = self.stored if self.rows is None else self.stored.index_select(0, self.rows)
        x = _resized(x, self.shape) if self.shape else x
        return x if self.columns is None else x[..., self.columns].contiguous()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        *rest, width = self.shape or self.stored.shape[1:]
        return (*rest, width if self.columns is None else len(range(width)[self.columns]))

    def take(self, indices: Tensor | slice) -> "Samples":
        """Return some of these samples, without copying pixels."""
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        writers = None if self.writers is None else self.writers[indices]
        further = {name: y[indices] for name, y in self.further.items()}
        return dataclasses.replace(
            self, y=self.y[indices], writers=writers, rows=rows[indices], further=further
        )

    def sized(self, shape: tuple[int, ...]) -> "Samples":
        """Return the same samples, resized to ``shape`` when gathered; copies no pixels.

        Raises:
            DataError: they have another shape and are not images.
        """
        found = self.sample_shape
        if found == shape or not len(self):
            return self
        check_resizable(found, shape)
        return dataclasses.replace(self, shape=shape)


@dataclass(frozen=True)
class Parts:
    """A client's own data as its files divide them."""

    train: Samples
    validation: Samples | None  # None: hold it out of ``train``
    test: Samples
    classes: tuple[str, ...]
    columns: Columns = field(default_factory=dict)


def nothing(shape: tuple[int, ...]) -> Samples:
    """Return zero samples of a shape."""
    return Samples(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


def join(parts: Iterable[Samples]) -> Samples:
    """Return the samples of several parts as one."""
    xs, ys = zip(*((part.x, part.y) for part in parts), strict=True)
    alike = len({x.dtype for x in xs}) == 1
    return Samples(torch.cat(xs if alike else [as_floats(x) for x in xs]), torch.cat(ys))


def _resized(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return images resized bilinearly; the result for one does not depend on the others."""
    from torchvision.transforms.v2 import functional  # takes seconds to import

    resized: Tensor = functional.resize(x, list(shape[1:]), antialias=True)
    return resized


def as_floats(x: Tensor) -> Tensor:
    """Return pixels as float32: bytes divided by 255, floats as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x
