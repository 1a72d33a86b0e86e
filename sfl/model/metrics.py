"""Figures of training steps and of evaluated samples: sums that are the same in any order.

``counts`` are numbers of samples; which samples are counted, the task says.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfl.errors import ProtocolError, quoted

MOST_LOSS = 1e60  # of a batch or a part: far above what float32 gives, far below what sums overflow


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one training step: the batch's mean loss, and its counts."""

    loss: float
    counts: tuple[int, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Samples, counts and summed loss of some evaluated batches.

    ``table``: further counts, int64; nothing, if this side has not seen the labels.
    """

    samples: int = 0
    counts: tuple[int, ...] = ()
    loss_sum: float = 0.0
    table: Tensor | None = None


class Total:
    """The sum of tallies, which is the same in any order; of each only its loss is kept."""

    def __init__(self) -> None:
        self._sum = Tally()
        self._losses = array("d")

    def add(self, tally: Tally) -> None:
        if not tally.samples:  # an empty part has no classes
            return
        self._losses.append(tally.loss_sum)
        if not self._sum.samples:
            self._sum = tally
            return
        ours, theirs = self._sum.table, tally.table
        self._sum = Tally(
            self._sum.samples + tally.samples,
            tuple(a + b for a, b in zip(self._sum.counts, tally.counts, strict=True)),
            table=None if ours is None or theirs is None else ours + theirs,
        )

    @property
    def tally(self) -> Tally:
        return replace(self._sum, loss_sum=math.fsum(self._losses))


def add_up(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    total = Total()
    for one in tallies:
        total.add(one)
    return total.tally


def checked(loss: float, counts: Sequence[float], samples: int) -> tuple[float, tuple[int, ...]]:
    """Return a peer's loss, or sum of losses, and counts over so many samples.

    Raises:
        ProtocolError: losses and counts cannot be that. NaN and infinity can: training diverges.
    """
    if loss < 0 or MOST_LOSS < loss < math.inf:
        raise ProtocolError(f"{loss:g} is no loss")
    for count in counts:
        if not (0 <= count <= samples and count == int(count)):
            raise ProtocolError(f"{quoted(count, 40)} counts no samples of {samples}")
    return loss, tuple(map(int, counts))


def checked_steps(table: Tensor, sizes: Tensor) -> Tensor:
    """Return a peer's loss and counts of its steps, with their sizes: (steps, 2 + counts) float64.

    ``table``: (steps, 1 + counts) float64; ``sizes``: (steps,), the samples of each.

    Raises:
        ProtocolError: as ``checked``.
    """
    loss, counts, samples = table[:, 0], table[:, 1:], sizes.double()[:, None]
    no_loss = (loss < 0) | ((loss > MOST_LOSS) & (loss < math.inf))
    fine = (counts >= 0) & (counts <= samples) & (counts == counts.trunc())
    if (wrong := (no_loss | ~fine.all(1)).nonzero()).numel():
        step = int(wrong[0])
        checked(loss[step].item(), counts[step].tolist(), int(sizes[step]))
    return torch.cat([table, samples], 1)
