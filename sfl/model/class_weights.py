"""Weights of the classes in the training loss, for data in which some classes are rare."""

from collections.abc import Iterable, Sequence

from sfl.errors import ConfigError

NONE, BALANCED = "none", "balanced"
LEAST, MOST = 1e-6, 1e6  # of a class: what float32 adds up


def class_weights(
    text: str, num_classes: int, counts: Iterable[Sequence[int]] = ()
) -> tuple[float, ...]:
    """Return the weight of each class that ``--class-weights`` means; none for the plain loss.

    ``counts``: how many training samples each client has of each class. ``balanced`` weighs a class
    by all samples over (classes times its own samples), as King and Zeng 2001, Section 3, and
    scikit-learn; a class without samples by 0, which no loss ever sees.

    Raises:
        ConfigError: the text is neither ``none`` nor ``balanced`` nor a number above 0 a class.
    """
    if text == NONE:
        return ()
    if text == BALANCED:
        sums = [sum(column) for column in zip(*counts, strict=True)]
        return tuple(sum(sums) / (num_classes * n) if n else 0.0 for n in sums)
    weights = parse(text)
    if len(weights) != num_classes:
        raise ConfigError(
            f"--class-weights {text}: {len(weights)} weights for {num_classes} classes"
        )
    return weights


def parse(text: str) -> tuple[float, ...]:
    """Return the weights of a list of numbers; none for a word.

    Raises:
        ConfigError: it is neither.
    """
    if text in (NONE, BALANCED):
        return ()
    try:
        weights = tuple(float(number) for number in text.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(LEAST <= w <= MOST for w in weights):
        raise ConfigError(
            f"--class-weights {text!r}: give {NONE}, {BALANCED}, or a number from {LEAST:g}"
            f" to {MOST:g} for each class"
        )
    return weights
