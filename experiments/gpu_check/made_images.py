"""Images from a seed: as a data set, and as clients' own data. Nothing is read or downloaded."""

from pathlib import Path

import numpy as np
import torch

from sfl.data.client_data import DatasetSpec, Source
from sfl.data.samples import Samples

NUM_CLASSES = 10
GREY = "experiments.gpu_check.made_images:grey"
COLOUR = "experiments.gpu_check.made_images:colour"
# A fifth is held out: 12 and 3 batches of 128 for one client, a third of them for each of three.
NUM_GREY, NUM_COLOUR, NUM_TEST = 1920, 480, 30


def images(shape: tuple[int, ...], count: int, *, seed: int) -> Samples:
    """Return noise with a bright band whose place tells the class: (count, C, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (count, *shape), dtype=torch.uint8, generator=generator)
    y = torch.arange(count) % NUM_CLASSES
    height = shape[-2] // NUM_CLASSES
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, height * label : height * (label + 1)] += 190
    return Samples(x, y)


def _data_set(shape: tuple[int, ...], count: int) -> DatasetSpec:
    def load(source: Source) -> tuple[Samples, Samples]:
        return images(shape, count, seed=0), images(shape, NUM_TEST, seed=1)

    return DatasetSpec(load, shape, tuple(map(str, range(NUM_CLASSES))), mean=0.2, std=0.25)


def grey() -> DatasetSpec:
    """Return images of 1x28x28."""
    return _data_set((1, 28, 28), NUM_GREY)


def colour() -> DatasetSpec:
    """Return images of 3x64x64."""
    return _data_set((3, 64, 64), NUM_COLOUR)


def write_own(folder: Path, num_clients: int, num_samples: int) -> None:
    """Write data of their own for clients, as ``folder/client_k/own.npz``: 1x28x28."""
    for client in range(num_clients):
        place = folder / f"client_{client}"
        place.mkdir(parents=True)
        train = images((1, 28, 28), num_samples, seed=10 + client)
        test = images((1, 28, 28), NUM_TEST, seed=100 + client)
        np.savez(
            place / "own.npz",
            x=train.x.numpy(),
            y=train.y.numpy(),
            x_test=test.x.numpy(),
            y_test=test.y.numpy(),
        )
