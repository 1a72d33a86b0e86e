"""Data sets, partitions among clients, batches and augmentation."""

from sfl.data.client_data import DatasetSpec, Source
from sfl.data.samples import Samples

__all__ = ["DatasetSpec", "Samples", "Source"]
