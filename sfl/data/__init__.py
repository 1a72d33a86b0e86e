"""Who trains on what: data sets, partitions, batches, augmentation."""

from sfl.data.client_data import DatasetSpec
from sfl.data.samples import Samples

__all__ = ["DatasetSpec", "Samples"]
