"""Figures of training steps and of evaluated samples."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfl.errors import ProtocolError, quoted

MOST_LOSS = 1e60  # of a batch or a part: far above what float32 gives, far below what sums overflow


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one training step: the batch's mean loss, and its hits."""

    loss: float
    correct: int
    samples: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Samples, hits and summed loss of some evaluated batches.

    ``per_class``: (3, classes) int64, how many samples of each class there are, how many were taken
    for it, and how many rightly; nothing, if this side has not seen the labels.
    """

    samples: int = 0
    correct: int = 0
    loss_sum: float = 0.0
    per_class: Tensor | None = None

    def figures(self, prefix: str) -> dict[str, float]:
        """Return the metrics as ``<prefix>_loss``, ``<prefix>_acc`` and so on, if there are any."""
        if not self.samples:
            return {}
        metrics = {"loss": self.loss_sum / self.samples, "acc": self.correct / self.samples}
        if self.per_class is not None:
            metrics |= class_metrics(self.per_class)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


def tally(logits: Tensor, y: Tensor) -> Tally:
    """Count what logits (B, classes) make of a batch with labels ``y``: (B,)."""
    loss_sum = nn.functional.cross_entropy(logits, y, reduction="sum")
    classes, taken_for = logits.shape[1], logits.argmax(1)
    right = y[taken_for == y]
    per_class = torch.stack([torch.bincount(v, minlength=classes) for v in (y, taken_for, right)])
    return Tally(len(y), len(right), loss_sum.item(), per_class.cpu())


def class_metrics(per_class: Tensor) -> dict[str, float]:
    """Return balanced accuracy, macro and weighted F1 of counts by class: (3, classes).

    They are scikit-learn's ``balanced_accuracy_score`` and ``f1_score``: balanced accuracy is the
    mean recall of the classes that there are; F1 of a class is 0 where nothing was right, and the
    macro average leaves out classes that neither occur nor were guessed.
    """
    there, taken_for, right = per_class.double()
    recall = right[there > 0] / there[there > 0]
    occurs = there + taken_for > 0
    f1 = 2 * right[occurs] / (there + taken_for)[occurs]
    weights = there[occurs] / there.sum()
    return {
        "balanced_acc": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * weights).sum()),
    }


class Total:
    """The sum of tallies, which is the same in any order; of each only its loss is kept."""

    def __init__(self) -> None:
        self._samples = self._correct = 0
        self._losses = array("d")
        self._per_class: Tensor | None = None

    def add(self, tally: Tally) -> None:
        if not tally.samples:  # an empty part has no classes
            return
        ours, theirs = self._per_class, tally.per_class
        if not self._samples:
            self._per_class = theirs
        else:
            self._per_class = None if ours is None or theirs is None else ours + theirs
        self._samples += tally.samples
        self._correct += tally.correct
        self._losses.append(tally.loss_sum)

    @property
    def tally(self) -> Tally:
        return Tally(self._samples, self._correct, math.fsum(self._losses), self._per_class)


def add_up(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    total = Total()
    for one in tallies:
        total.add(one)
    return total.tally


def checked(loss: float, correct: float, samples: int) -> tuple[float, int]:
    """Return a peer's loss, or sum of losses, and hits over so many samples.

    Raises:
        ProtocolError: cross-entropy and hits cannot be that. NaN and infinity can: training
            diverges.
    """
    if loss < 0 or MOST_LOSS < loss < math.inf:
        raise ProtocolError(f"{loss:g} is no loss")
    if not (0 <= correct <= samples and correct == int(correct)):
        raise ProtocolError(f"{quoted(correct, 40)} hits in {samples} samples")
    return loss, int(correct)


def checked_steps(table: Tensor, sizes: Tensor) -> Tensor:
    """Return a peer's loss and hits of its steps, with their sizes: (steps, 3) float64.

    ``table``: (steps, 2) float64; ``sizes``: (steps,), the samples of each.

    Raises:
        ProtocolError: as ``checked``.
    """
    (loss, correct), samples = table.unbind(1), sizes.double()
    no_loss = (loss < 0) | ((loss > MOST_LOSS) & (loss < math.inf))
    hits = (correct >= 0) & (correct <= samples) & (correct == correct.trunc())
    if (wrong := (no_loss | ~hits).nonzero()).numel():
        step = int(wrong[0])
        checked(loss[step].item(), correct[step].item(), int(sizes[step]))
    return torch.column_stack([loss, correct, samples])


def checked_classes(rows: Sequence[object], correct: int, samples: int, classes: int) -> Tensor:
    """Return a peer's counts by class, which must go with its hits.

    Raises:
        ProtocolError: they cannot be counts of so many samples.
    """
    fits = len(rows) == 3 and all(
        isinstance(row, list) and len(row) == classes
        and all(type(n) is int and 0 <= n <= samples for n in row)
        for row in rows
    )  # fmt: skip
    counts = torch.tensor(rows if fits else [[-1]] * 3, dtype=torch.int64)
    sums = counts.sum(1).tolist()
    if sums != [samples, samples, correct] or (counts[2] > counts[:2].min(0).values).any():
        raise ProtocolError(f"these are no counts of {samples} samples by {classes} classes")
    return counts
