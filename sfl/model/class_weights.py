"""Class weights in the training loss, for data with rare classes."""

from collections.abc import Iterable, Sequence

from sfl.errors import ConfigError

NONE, BALANCED = "none", "balanced"
LEAST, MOST = 1e-6, 1e6  # of a class; sums in float32 stay meaningful


def class_weights(
    text: str, num_classes: int, counts: Iterable[Sequence[int]] = ()
) -> tuple[float, ...]:
    """Return each class's weight for a value of ``--class-weights``; empty for the plain loss.

    ``counts``: training samples of each class, by client. ``balanced``: n / (C n_c) with n samples,
    C classes and n_c samples of the class, as in King and Zeng 2001, Section 3, and scikit-learn;
    0 for a class without samples.

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
    """Return the weights of a list of numbers; empty for ``none`` and ``balanced``.

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
