"""A client's training, validation and test data, and the batches drawn from them.

Images stay as they were read (uint8 or float32), possibly mapped from a file. They become
normalised float32 of the run's image size when a batch is drawn.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.augment import NONE, Change, augment, changes_of
from sfl.data.label_tasks import LABEL_TASKS
from sfl.data.partition import VERTICAL, deal
from sfl.data.samples import Columns, Samples, as_floats
from sfl.data.vertical import Ids, rows_of, strip, strip_of
from sfl.errors import ConfigError, DataError
from sfl.values import Position

LARGEST_FIGURE = 1e9  # largest mean of --normalize; 1 over it is the smallest std: within float32
VALIDATION_SHARE = 5  # one in five of a client's training samples is held out


@dataclass(frozen=True)
class Source:
    """Where a data set is loaded from, and the shape its images should have."""

    folder: Path  # --data-dir
    cache: Path  # --cache-dir: holds decoded images
    input_shape: tuple[int, ...]  # of a sample; a batch's images are resized to it
    say: Callable[[str], None] = print  # reports progress to the user


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: how to load its training and test set, and the kind of its samples.

    ``mean`` and ``std`` are for pixels in [0, 1] (bytes divided by 255; floats as they are): one
    value, or one for each channel. ``augment`` is the default of ``--augment``. ``background`` is
    the grey in [0, 1] of pixels from outside an image.
    """

    load: Callable[[Source], tuple[Samples, Samples]]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    augment: str = NONE
    background: float = 0.0
    has_writers: bool = False
    num_samples: int = 0  # of training and test set together, at most; 0: unknown
    decodes: bool = False  # loads images at the run's size, and caches them so

    @property
    def has_images(self) -> bool:
        return len(self.input_shape) == 3

    def sized(self, side: int) -> "DatasetSpec":
        """Return the data set with square images of this side length; 0 keeps its own.

        Raises:
            ConfigError: its samples are not images.
        """
        if not side:
            return self
        if not self.has_images:
            raise ConfigError(
                f"--image-size {side}: the samples of the data set, {list(self.input_shape)}, are"
                " no images"
            )
        return dataclasses.replace(self, input_shape=(self.input_shape[0], side, side))


def parse_normalize(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of ``--normalize``: one value, or one for each channel.

    Raises:
        ConfigError: the text is not ``mean=M,std=S``, or a value is out of range.
    """
    found = re.fullmatch(r"mean=([^,]+),std=([^,]+)", text)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if found:
        with contextlib.suppress(ValueError):
            mean, std = (tuple(map(float, figures.split("/"))) for figures in found.groups())
    most = LARGEST_FIGURE
    in_range = all(
        -most <= m <= most and 1 / most <= s <= most for m, s in zip(mean, std, strict=False)
    )
    if not mean or len(mean) != len(std) or not in_range:
        raise ConfigError(
            f"--normalize {text!r:.120}: give mean=M,std=S, with a number for all channels or, as"
            f" in mean=0.5/0.4/0.3,std=0.2/0.2/0.2, one for each; std above 0, none beyond {most:g}"
        )
    return mean, std


def normalised(spec: DatasetSpec, run: RunConfig) -> DatasetSpec:
    """Return the data set with the run's ``--normalize``, if it is given.

    Raises:
        ConfigError: the number of values differs from the number of channels.
    """
    if not run.normalize:
        return spec
    mean, std = parse_normalize(run.normalize)
    if len(mean) not in (1, spec.input_shape[0]):
        raise ConfigError(
            f"--normalize {run.normalize}: {len(mean)} means, but samples of {run.dataset} have"
            f" {spec.input_shape[0]} channels"
        )
    return dataclasses.replace(spec, mean=mean, std=std)


def load(spec: DatasetSpec, source: Source) -> tuple[Samples, Samples]:
    """Return a data set's training and test samples.

    Raises:
        DataError: they are missing, damaged, or do not fit the spec.
    """
    train, test = spec.load(source)
    for part, samples in (("training", train), ("test", test)):
        if wrong := _what_is_wrong(samples, spec):
            raise DataError(f"the {part} samples of the data set are wrong: {wrong}")
    return train, test


def _what_is_wrong(samples: object, spec: DatasetSpec) -> str:
    """Return why samples cannot be used; "" if they can."""
    if not isinstance(samples, Samples) or not all(
        isinstance(tensor, Tensor) for tensor in (samples.stored, samples.y)
    ):
        return "they are no sfl.data.samples.Samples of tensors"
    x, y = samples.stored, samples.y
    count = len(x) if samples.rows is None else len(samples.rows)
    if y.dtype != torch.int64 or y.dim() != 1 or len(y) != count:
        return (
            f"{count} samples, and labels {list(y.shape)} of {y.dtype}; wanted is int64, one each"
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(spec.classes):
        return f"labels {y.min()} to {y.max()}, of {len(spec.classes)} classes"
    if x.dtype not in (torch.uint8, torch.float32):
        return f"x is {x.dtype}; wanted is uint8, or float32 in [0, 1]"
    shape = tuple(x.shape[1:])
    if len(shape) != len(spec.input_shape) or shape[0] != spec.input_shape[0]:
        return f"samples of shape {list(shape)}, but the data set says {list(spec.input_shape)}"
    for figures in (spec.mean, spec.std):
        if isinstance(figures, tuple) and len(figures) != shape[0]:
            return f"mean and std of {len(figures)} channels, of which there are {shape[0]}"
    return ""


@dataclass(frozen=True)
class Identified:
    """The ids of a client's samples, by which they are aligned with those of other clients."""

    ids: Ids
    run: RunConfig  # with the options that these samples are read with


@dataclass(frozen=True)
class ClientData:
    """One client's training, validation and test samples."""

    train: Samples
    validation: Samples
    test: Samples
    spec: DatasetSpec
    classes: tuple[str, ...]
    seed: int = 0
    changes: tuple[Change, ...] = ()  # of training images, at random
    identified: Identified | None = None  # of samples that are not yet aligned
    columns: Columns = field(default_factory=dict)
    has_labels: bool = True

    @property
    def num_samples(self) -> dict[str, int]:
        """The number of samples of each part."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(samples) for name, samples in parts.items()}

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.spec.input_shape

    def aligned(self, wanted: Ids, drawn_as: int) -> "ClientData":
        """Return the samples with these ids, in their order, for training, validation and test.

        Without common validation samples, a part is held out as by the client ``drawn_as``.

        Raises:
            DataError: an id is not among these samples.
        """
        assert self.identified is not None
        ids, parts = self.identified.ids, (self.train, self.validation, self.test)
        train, validation, test = (
            samples.take(rows_of(wanted[name], ids[name]))
            for name, samples in zip(ids, parts, strict=True)
        )
        given = validation if len(validation) else None
        return client_data(
            self.spec, self.identified.run, drawn_as, train, test,
            classes=self.classes, validation=given,
        )  # fmt: skip

    def of_task(self, name: str) -> "ClientData":
        """Return the same samples with the labels of a task: a further column, or a function.

        Samples without labels stay as they are.

        Raises:
            DataError: they have no such labels.
        """
        if not self.has_labels:
            return self
        parts = {part: getattr(self, part) for part in ("train", "validation", "test")}
        classes = self.columns.get(name, self.classes)
        for part, samples in parts.items():
            if name in self.columns:
                y = samples.further[name]
            elif name in LABEL_TASKS:
                y, classes = LABEL_TASKS[name](samples.y, self.classes)
            else:
                raise DataError(f"the samples have no labels for the task {name}")
            parts[part] = dataclasses.replace(samples, y=y)
        return dataclasses.replace(self, classes=classes, **parts)

    def batch(self, samples: Samples, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return ``x``: (B, C, H, W) float32, normalised, and ``y``: (B,) int64."""
        part = samples.take(indices)
        return self._normalised(as_floats(part.x)), part.y

    def training_batch(self, indices: Tensor, at: Position) -> tuple[Tensor, Tensor]:
        """Return a step's batch, augmented; shapes as of ``batch``."""
        part, background = self.train.take(indices), self.spec.background
        x = as_floats(part.x)
        x = augment(x, self.changes, background, seed=self.seed, at=at)
        return self._normalised(x), part.y

    @functools.cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        channels = (-1, *[1] * (len(self.input_shape) - 1))
        mean, std = (
            torch.tensor(figures, dtype=torch.float32).reshape(channels)
            for figures in (self.spec.mean, self.spec.std)
        )
        return mean, std

    def _normalised(self, x: Tensor) -> Tensor:
        """Normalise a batch in place; it is a copy of the stored samples."""
        mean, std = self._mean_and_std
        return x.sub_(mean).div_(std)


def part_of(
    spec: DatasetSpec, run: RunConfig, client: int, loaded: tuple[Samples, Samples]
) -> ClientData:
    """Return a client's part of a data set that every machine has, as studies do.

    Raises:
        DataError: the client's part is empty, or no draw gives every client enough samples.
    """
    train, test = deal(*loaded, run)[client]
    return client_data(spec, run, client, train, test)


def client_data(
    spec: DatasetSpec,
    run: RunConfig,
    client: int,
    part: Samples,
    test: Samples,
    *,
    classes: tuple[str, ...] | None = None,
    validation: Samples | None = None,
) -> ClientData:
    """Return a client's data; without ``validation``, a fifth of ``part`` is held out for it.

    The fifth is drawn from (seed, client).

    Raises:
        ConfigError: the samples cannot be augmented, or normalised as the run says.
        DataError: ``part`` is empty, or its samples do not fit the data set.
    """
    spec = normalised(spec, run)
    if not len(part):
        raise DataError(f"client {client} has no training samples (--partition {run.partition})")
    named = run.augment or spec.augment
    changes = changes_of(NONE if run.partition == VERTICAL else named)
    if changes and not spec.has_images:
        raise ConfigError(f"--augment {named}: the samples of {run.dataset} are no images")
    part, test = part.sized(spec.input_shape), test.sized(spec.input_shape)
    if run.partition == VERTICAL:  # all clients hold out the same samples
        part, test = strip(part, run, client), strip(test, run, client)
        spec = dataclasses.replace(spec, input_shape=strip_of(spec.input_shape, run, client))
        client = run.label_client
    drawn = seeds.generator(run.seed, seeds.VALIDATION, client)
    order = torch.randperm(len(part), generator=drawn)
    num_held_out = held_out(len(part)) if validation is None else 0
    if validation is None:
        validation = part.take(order[:num_held_out])
    return ClientData(
        train=part.take(order[num_held_out:]),
        validation=validation.sized(spec.input_shape),
        test=test,
        spec=spec,
        classes=classes or spec.classes,
        seed=run.seed,
        changes=changes,
    )


def held_out(num_samples: int) -> int:
    """Return how many of so many training samples are held out for validation."""
    return num_samples // VALIDATION_SHARE


def num_batches(num_samples: int, batch_size: int) -> int:
    """Return the number of batches in one pass over the samples.

    The last, smaller batch is kept. A last batch of one sample, which BatchNorm cannot train on,
    joins the batch before it.
    """
    whole, rest = divmod(num_samples, batch_size)
    return whole + (rest > 1 or (rest == 1 and whole == 0))


def batch_sizes(num_samples: int, batch_size: int) -> Iterator[int]:
    """Yield the sizes of the batches in one pass over the samples."""
    count = num_batches(num_samples, batch_size)
    for _ in range(count - 1):
        yield batch_size
    yield num_samples - (count - 1) * batch_size


def step_sizes(num_samples: int, run: RunConfig) -> Tensor:
    """Return the sizes of a round's batches, over all its local epochs: (steps,) int64."""
    count = num_batches(num_samples, run.batch_size)
    an_epoch = torch.full((count,), run.batch_size)
    an_epoch[-1] = num_samples - (count - 1) * run.batch_size
    return an_epoch.repeat(run.local_epochs)


def batch_indices(
    num_samples: int, run: RunConfig, *, round_index: int, client: int
) -> Iterator[Tensor]:
    """Yield the indices of each step's samples in a round, over all its local epochs."""
    sizes = list(batch_sizes(num_samples, run.batch_size))
    for epoch in range(run.local_epochs):
        drawn = seeds.generator(run.seed, seeds.BATCHES, round_index, client, epoch)
        yield from torch.split(torch.randperm(num_samples, generator=drawn), sizes)
