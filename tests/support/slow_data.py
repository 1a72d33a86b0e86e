"""A data set of a user's own that takes long to load."""

import dataclasses
import time
from typing import Any

from sfl.data.client_data import DatasetSpec, Source
from sfl.data.datasets import DATASETS


def slow_to_load() -> DatasetSpec:
    known = DATASETS["mnist-5k"]

    def load(source: Source) -> Any:
        time.sleep(3)
        return known.load(source)

    return dataclasses.replace(known, load=load)
