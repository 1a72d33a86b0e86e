"""A client's own private data (``--partition own``): class folders of images, or an ``.npz``.

::

    DIR/<class>/*.png ...                           no test set
    DIR/train/<class>/*.png  DIR/test/<class>/...   with a test set
    DIR/anything.npz                                x (N, H, W) or (N, C, H, W), y (N,), and, if
                                                    wanted, x_test, y_test, classes (names)

Images are brought to the data set's channels and size. Every client must have the same class
folders, in which there may be nothing.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfl.config import RunConfig
from sfl.data import ClientData, DatasetSpec, client_data
from sfl.errors import DataError
from sfl.images import read_image
from sfl.samples import Samples

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


def load_own(spec: DatasetSpec, run: RunConfig, client: int, data_dir: Path) -> ClientData:
    """Return a client's own data, a fifth of which is held out for validation.

    Raises:
        DataError: nothing there, a damaged file, or samples that do not fit the data set.
    """
    archives = [data_dir] if data_dir.suffix == ".npz" else sorted(data_dir.glob("*.npz"))
    if len(archives) > 1:
        raise DataError(f"{data_dir} has {len(archives)} .npz files; give --data-dir one of them")
    if archives:
        part, test, classes = _load_npz(archives[0], spec)
    elif data_dir.is_dir():
        part, test, classes = _load_folders(data_dir, spec)
    else:
        raise DataError(f"no own data at {data_dir}: give --data-dir a folder or an .npz file")
    if not len(part):
        raise DataError(f"{data_dir} holds no training samples")
    return client_data(spec, run, client, part, test, classes)


def num_images(data_dir: Path) -> int:
    """Return how many image files lie in a folder, of whatever class and part."""
    return sum(path.suffix.lower() in IMAGE_SUFFIXES for path in data_dir.rglob("*"))


def _load_folders(data_dir: Path, spec: DatasetSpec) -> tuple[Samples, Samples, tuple[str, ...]]:
    has_test = (data_dir / "train").is_dir()
    train_dir = data_dir / "train" if has_test else data_dir
    classes = tuple(sorted(p.name for p in train_dir.iterdir() if _is_class_folder(p)))
    if not classes:
        raise DataError(
            f"{train_dir} is empty: put one folder of images a class there, or an .npz file"
        )
    test_dir = data_dir / "test"
    foreign = sorted(
        p.name for p in (test_dir.iterdir() if has_test and test_dir.is_dir() else ())
        if _is_class_folder(p) and p.name not in classes
    )  # fmt: skip
    if foreign:
        raise DataError(f"{test_dir} has classes that {train_dir} lacks: {', '.join(foreign)}")
    part = _read_images(train_dir, classes, spec)
    test = _read_images(test_dir, classes, spec) if has_test else _nothing(spec)
    return part, test, classes


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _nothing(spec: DatasetSpec) -> Samples:
    empty = torch.empty(0, *spec.input_shape, dtype=torch.uint8)
    return Samples(empty, torch.empty(0, dtype=torch.int64))


def _read_images(folder: Path, classes: tuple[str, ...], spec: DatasetSpec) -> Samples:
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        paths = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for path in paths:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(torch.from_numpy(read_image(path, spec.input_shape)))
                labels.append(label)
    if not images:
        return _nothing(spec)
    return Samples(torch.stack(images), torch.tensor(labels, dtype=torch.int64))


def _load_npz(path: Path, spec: DatasetSpec) -> tuple[Samples, Samples, tuple[str, ...]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            read = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not {"x", "y"} <= read.keys():
        raise DataError(
            f"{path} has arrays {', '.join(sorted(read)) or 'none'}; wanted are x and y"
        )
    classes = tuple(map(str, read["classes"].reshape(-1))) if "classes" in read else spec.classes
    part = _samples(path, read["x"], read["y"], spec, len(classes))
    if not {"x_test", "y_test"} <= read.keys():
        return part, _nothing(spec), classes
    return part, _samples(path, read["x_test"], read["y_test"], spec, len(classes)), classes


def _samples(
    path: Path, x: np.ndarray, y: np.ndarray, spec: DatasetSpec, num_classes: int
) -> Samples:
    channels = spec.input_shape[0]
    fits = (x.ndim == 4 and x.shape[1] == channels) or (x.ndim == 3 and channels == 1)
    if not fits:
        raise DataError(
            f"{path}: samples of shape {list(x.shape[1:])}; wanted are (N, {channels}, H, W)"
            + (" or (N, H, W)" if channels == 1 else "")
        )
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{path}: y must hold one integer for each sample of x")
    if np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
        if not ((x >= 0) & (x <= 1)).all():
            raise DataError(f"{path}: x holds floats outside [0, 1]")
    elif x.dtype != np.uint8:
        raise DataError(f"{path}: x is {x.dtype}; wanted is uint8, or floats in [0, 1]")
    if len(y) and not 0 <= y.min() <= y.max() < num_classes:
        raise DataError(
            f"{path}: labels {y.min()} to {y.max()}, but there are {num_classes} classes"
        )
    return Samples(
        torch.from_numpy(x.reshape(len(x), channels, *x.shape[-2:])),
        torch.from_numpy(y.astype(np.int64)),
    )
