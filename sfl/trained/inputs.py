"""Samples to predict, as a model expects them: files of images, folders, arrays, a run's test set.

::

    a file            an image of any size and mode that Pillow reads, or an .npz with x
    a folder          its images; or, in folders named as classes, images whose class is known

They are resized, converted and normalised as a client's own data are in training.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfl.conversation.party import TEST
from sfl.data.class_names import listed
from sfl.data.client_data import ClientData, DatasetSpec
from sfl.data.image_folders import sort_out, why_no_class, why_no_image
from sfl.data.images import read_images
from sfl.data.npz import names_labels, read_npz
from sfl.data.samples import Samples, nothing
from sfl.errors import ConfigError, DataError
from sfl.interactive.run import Run

Say = Callable[[str], None]
UNKNOWN = -1  # the label of a sample whose class is not known
_PARTS = {"train": "x", "validation": "x_val", "test": "x_test"}  # of an .npz


@dataclass(frozen=True)
class Batch:
    """Some samples.

    x  (B, *input) float32, normalised
    y  (B,) int64, their labels, or UNKNOWN
    """

    names: Sequence[str]
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Expected:
    """The samples that a model expects."""

    spec: DatasetSpec
    any_range: bool  # whether floats need not be in [0, 1]
    batch: int  # samples that it takes at once, at most

    def normalised(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``y`` of a batch."""
        empty = nothing(self.spec.input_shape)
        data = ClientData(empty, empty, samples, self.spec, self.spec.classes)
        return data.batch(samples, slice(None))


class Files:
    """What the user has named, looked through before anything is read.

    Raises:
        DataError: something is not there, is empty, or does not fit the model.
    """

    def __init__(self, paths: Sequence[Path], expected: Expected, say: Say) -> None:
        self._expected, self._say = expected, say
        self._images: list[tuple[Path, int]] = []
        self._arrays: list[Path] = []
        for path in paths:
            if path.is_dir():
                self._images += self._in_folder(path)
            elif not path.is_file():
                raise DataError(f"{path}: there is no such file or folder")
            elif path.suffix.lower() == ".npz":
                self._arrays.append(path)
            else:
                self._images.append((path, UNKNOWN))
        shape = expected.spec.input_shape
        if self._images and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise DataError(
                f"{self._images[0][0]}: the model takes samples of shape {list(shape)}, which are"
                " no grey or coloured images: give an .npz file"
            )

    def _in_folder(self, folder: Path) -> list[tuple[Path, int]]:
        """Return the images of a folder with their labels."""
        classes = self._expected.spec.classes
        folders, beside = sort_out(folder, why_no_class)
        images, left = sort_out(folder, why_no_image)
        names = [path.name for path in folders]
        if images and not set(names) & set(classes):
            self._say_left(folder, left)
            return [(path, UNKNOWN) for path in images]
        if foreign := [name for name in names if name not in classes]:
            raise DataError(
                f"{folder} has folders {listed(foreign, classes)}, which are none of the model's"
                f" classes {listed(classes, foreign)}; give folders of images themselves"
            )
        self._say_left(folder, beside)
        found = []
        for path in folders:
            inside, left = sort_out(path, why_no_image)
            self._say_left(path, left)
            found += [(image, classes.index(path.name)) for image in inside]
        if not found:
            raise DataError(f"{folder} holds no images, nor folders of them named as classes")
        return found

    def _say_left(self, folder: Path, left: str) -> None:
        if left:
            self._say(f"{folder}: {left}")

    def __iter__(self) -> Iterator[Batch]:
        size = self._expected.batch
        for start in range(0, len(self._images), size):
            yield self._of_images(self._images[start : start + size])
        for path in self._arrays:
            yield from self._of_arrays(path)

    def _of_images(self, images: Sequence[tuple[Path, int]]) -> Batch:
        paths = [path for path, _ in images]
        pixels = np.empty((len(paths), *self._expected.spec.input_shape), np.uint8)
        notes = read_images(paths, pixels)
        for note, count in sorted(notes.items()):
            self._say(f"{count} of {len(paths)} images {note}")
        labels = torch.tensor([label for _, label in images])
        x, y = self._expected.normalised(Samples(torch.from_numpy(pixels), labels))
        return Batch([str(path) for path in paths], x, y)

    def _of_arrays(self, path: Path) -> Iterator[Batch]:
        spec, has_labels = self._expected.spec, names_labels(path)
        parts = read_npz(
            path, spec, self._say, any_range=self._expected.any_range, has_labels=has_labels
        )
        numbers = _numbers(path, parts.classes, spec.classes) if has_labels else None
        for part, array in _PARTS.items():
            samples: Samples | None = getattr(parts, part)
            count = len(samples) if samples else 0
            for start in range(0, count, self._expected.batch):
                assert samples is not None
                chosen = slice(start, min(start + self._expected.batch, count))
                x, y = self._expected.normalised(samples.take(chosen).sized(spec.input_shape))
                known = torch.full_like(y, UNKNOWN) if numbers is None else numbers[y]
                yield Batch([f"{path}:{array}[{i}]" for i in range(start, chosen.stop)], x, known)


def _numbers(path: Path, theirs: Sequence[str], ours: Collection[str]) -> Tensor:
    """Return the model's number of each class of a file: (classes,) int64."""
    if foreign := [name for name in theirs if name not in ours]:
        raise DataError(
            f"{path} has classes {listed(foreign, ours)}, which are none of the model's"
            f" {listed(list(ours), foreign)}"
        )
    number = {name: index for index, name in enumerate(ours)}
    return torch.tensor([number[name] for name in theirs])


class TestSet:
    """The test samples of one client of a run, in the run's evaluation batches."""

    __test__ = False  # pytest: no tests

    def __init__(self, run: Run, client: int) -> None:
        self._run, self._client = run, client

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for x, y in self._run.batches(TEST, self._client):
            names = [f"client_{self._client}:test[{start + i}]" for i in range(len(y))]
            yield Batch(names, x, y)
            start += len(y)


def expected_of(run: Run) -> Expected:
    """Return what a run's model expects.

    Raises:
        ConfigError: its clients have parts of each sample.
    """
    if run.recipe.joins:
        raise ConfigError(
            f"{run.path}: --topology {run.config.topology}: its model takes a part of each sample"
            " from every client; predict with sfl.open_run(...).model() in Python"
        )
    known, spec = run.normalisation, run.data_spec
    spec = replace(spec, input_shape=known.input_shape, classes=known.classes)
    any_range = bool(run.config.normalize) or ":" in run.config.dataset or not spec.has_images
    return Expected(spec, any_range, run.split.evaluation_batch)
