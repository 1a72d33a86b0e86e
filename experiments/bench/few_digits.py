"""A few digits: a data set for models that take long for each of them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfl.data.client_data import DatasetSpec

FEW_DIGITS = "experiments.bench.few_digits:few_digits"
EVERY = 6  # 667 digits train, of which a client holds out a fifth: 17 steps of 32


def few_digits() -> "DatasetSpec":
    """Return every sixth digit of mnist-5k, which has them sorted by class."""
    import dataclasses

    from sfl.data.client_data import Source
    from sfl.data.datasets import DATASETS
    from sfl.data.samples import Samples

    whole = DATASETS["mnist-5k"]

    def load(source: Source) -> tuple[Samples, Samples]:
        train, test = (part.take(slice(None, None, EVERY)) for part in whole.load(source))
        return train, test

    return dataclasses.replace(whole, load=load)
