"""Figures of training steps and of evaluations: sums that do not depend on the order.

``counts`` are numbers of samples; the task defines which samples are counted.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfl.errors import ProtocolError, quoted

MAX_LOSS = 1e60  # of a batch or part: far above float32's range, and sums do not overflow


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one training step: the batch's mean loss, and counts."""

    loss: float
    counts: tuple[int, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Samples, counts and summed loss of evaluated batches.

    ``table``: further counts, int64; None if this side has not seen the labels.
    """

    samples: int = 0
    counts: tuple[int, ...] = ()
    loss_sum: float = 0.0
    table: Tensor | None = None


class Total:
    """The sum of tallies, equal in any order: ``math.fsum`` adds their losses at the end."""

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
    """Return a peer's loss, or sum of losses, and counts, after checking them.

    Raises:
        ProtocolError: they are impossible for so many samples. NaN and infinity are not: training
            may diverge.
    """
    if loss < 0 or MAX_LOSS < loss < math.inf:
        raise ProtocolError(f"{loss:g} is no loss")
    for count in counts:
        if not (0 <= count <= samples and count == int(count)):
            raise ProtocolError(f"{quoted(count, 40)} counts no samples of {samples}")
    return loss, tuple(map(int, counts))


def checked_steps(table: Tensor, sizes: Tensor) -> Tensor:
    """Return a peer's figures of its steps with their sizes: (steps, 2 + counts) float64.

    ``table``: loss and counts, (steps, 1 + counts) float64; ``sizes``: (steps,) samples.

    Raises:
        ProtocolError: as in ``checked``.
    """
    loss, counts, samples = table[:, 0], table[:, 1:], sizes.double()[:, None]
    no_loss = (loss < 0) | ((loss > MAX_LOSS) & (loss < math.inf))
    fine = (counts >= 0) & (counts <= samples) & (counts == counts.trunc())
    if (wrong := (no_loss | ~fine.all(1)).nonzero()).numel():
        step = int(wrong[0])
        checked(loss[step].item(), counts[step].tolist(), int(sizes[step]))
    return torch.cat([table, samples], 1)
