"""``LABEL_TASKS``: what several servers predict of the same samples, as functions of the label."""

from collections.abc import Callable

import torch
from torch import Tensor

from sfl.errors import DataError

Labels = tuple[Tensor, tuple[str, ...]]  # (N,) int64, and the names of their classes


def as_they_are(y: Tensor, classes: tuple[str, ...]) -> Labels:
    return y, classes


def digit(y: Tensor, classes: tuple[str, ...]) -> Labels:
    """Return the labels of samples that show numbers."""
    _numbers(classes)
    return y, classes


def parity(y: Tensor, classes: tuple[str, ...]) -> Labels:
    """Return whether the number that a sample shows is odd."""
    return _numbers(classes)[y] % 2, ("even", "odd")


def _numbers(classes: tuple[str, ...]) -> Tensor:
    """Return the classes' names as numbers: (C,) int64.

    Raises:
        DataError: they are none.
    """
    if not all(name.isascii() and name.isdigit() and len(name) < 19 for name in classes):
        raise DataError(f"the classes {', '.join(classes)} are no numbers")
    return torch.tensor([int(name) for name in classes])


LABEL_TASKS: dict[str, Callable[[Tensor, tuple[str, ...]], Labels]] = {
    "class": as_they_are,
    "digit": digit,
    "parity": parity,
}


def classes_of_tasks(tasks: str, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the classes of those of ``--tasks`` that are functions of a label with ``classes``.

    Raises:
        DataError: a task is none of such labels.
    """
    names = [name.strip() for name in tasks.split(",")] if tasks else ["class"]
    nothing = torch.empty(0, dtype=torch.int64)
    return {name: LABEL_TASKS[name](nothing, classes)[1] for name in names if name in LABEL_TASKS}
