"""Few combinations of several options instead of all of them."""

from collections.abc import Iterable
from itertools import combinations, product


def pairwise(*options: Iterable[object]) -> list[tuple[object, ...]]:
    """Return combinations in which each two values of two options meet at least once.

    Greedy: the combination that adds most new pairs comes next, the first of equal ones.
    """
    every = list(product(*options))
    left = {pair for combination in every for pair in _pairs(combination)}
    chosen = []
    while left:
        best = max(every, key=lambda combination: len(_pairs(combination) & left))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(combination: tuple[object, ...]) -> set[tuple[tuple[int, object], ...]]:
    return set(combinations(enumerate(combination), 2))
