"""Classification: the class of each sample. Outputs: (B, classes) logits; labels: (B,) int64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfl.errors import ProtocolError


def count_correct(logits: Tensor, y: Tensor) -> tuple[Tensor]:
    """Return the number of correctly classified samples: () int64."""
    return ((logits.argmax(1) == y).sum(),)


def most_likely(logits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the most likely classes: their probabilities and indices, (B, most), falling."""
    found = logits.softmax(1).topk(min(most, logits.shape[1]), dim=1)
    return found.values, found.indices


def made_up_labels(num_samples: int, num_classes: int) -> Tensor:
    """Return labels that cycle through all classes: (B,) int64."""
    return torch.arange(num_samples) % num_classes


def wrong_labels(y: Tensor, num_classes: int) -> str:
    """Return what is wrong with labels; "" if nothing is."""
    fits = 0 <= int(y.min()) <= int(y.max()) < num_classes
    return "" if fits else f"lie outside 0 to {num_classes - 1}"


def count_by_class(logits: Tensor, y: Tensor) -> Tensor:
    """Return by class the samples, predictions and correct predictions: (3, classes) int64."""
    classes, taken_for = logits.shape[1], logits.argmax(1)
    right = y[taken_for == y]
    return torch.stack([torch.bincount(v, minlength=classes) for v in (y, taken_for, right)])


def count_confusion(logits: Tensor, y: Tensor) -> Tensor:
    """Return the samples by class and by what they are taken for: (classes, classes) int64."""
    classes = logits.shape[1]
    pairs = y * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def checked_classes(
    rows: Sequence[object], counts: Sequence[int], samples: int, num_classes: int
) -> Tensor:
    """Return a peer's counts by class: (3, classes) int64; ``counts``: its correct samples.

    Raises:
        ProtocolError: they cannot be counts of so many samples, or contradict ``counts``.
    """
    fits = len(rows) == 3 and all(
        isinstance(row, list) and len(row) == num_classes
        and all(type(n) is int and 0 <= n <= samples for n in row)
        for row in rows
    )  # fmt: skip
    table = torch.tensor(rows if fits else [[-1]] * 3, dtype=torch.int64)
    sums = table.sum(1).tolist()
    if sums != [samples, samples, *counts] or (table[2] > table[:2].min(0).values).any():
        raise ProtocolError(f"these are no counts of {samples} samples by {num_classes} classes")
    return table


def class_metrics(by_class: Tensor) -> dict[str, float]:
    """Return balanced accuracy, macro and weighted F1 of counts by class: (3, classes).

    As scikit-learn's ``balanced_accuracy_score`` and ``f1_score``: balanced accuracy is the mean
    recall of classes with samples; F1 is 0 for a class without correct predictions; the macro
    average leaves out classes with neither samples nor predictions.
    """
    there, taken_for, right = by_class.double()
    recall = right[there > 0] / there[there > 0]
    occurs = there + taken_for > 0
    f1 = 2 * right[occurs] / (there + taken_for)[occurs]
    weights = there[occurs] / there.sum()
    return {
        "balanced_acc": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * weights).sum()),
    }
