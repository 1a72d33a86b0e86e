"""A client's own arrays in an ``.npz`` file.

::

    x (N, H, W), (N, C, H, W) or (N, H, W, C)    uint8, or floats
    y (N,)                                       integers, or names of classes
    x_val, y_val  x_test, y_test                 optional, each with the other
    classes                                      optional, names
    ids, ids_val, ids_test (N,)                  of clients that are joined: names of the samples
    y_NAME, y_NAME_val, y_NAME_test (N,)         with --tasks NAME: further labels, as y
    classes_NAME                                 optional, their names; else those in y_NAME, or
                                                 the integers up to its largest

If the data set's samples are not images, ``x`` has their shape. At clients that are joined, ``x``
may be a table (N, F) of floats at any client, and ``y`` is wanted at the one with the labels alone.
"""

import dataclasses
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfl.data.class_names import alike_among, listed
from sfl.data.client_data import DatasetSpec
from sfl.data.samples import Parts, Samples, check_resizable, nothing
from sfl.data.vertical import digests
from sfl.errors import DataError

Arrays = Mapping[str, np.ndarray]
PARTS = {"train": "", "validation": "_val", "test": "_test"}
IDS = ("ids", "ids_val", "ids_test")
NAMES = ("x", "y", "x_val", "y_val", "x_test", "y_test", "classes", *IDS)
MOST_CLASSES = 1000  # of further labels that are numbers
# What NumPy raises for files that are damaged or of another kind.
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError,
    NotImplementedError, SyntaxError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_table(path: Path, say: Callable[[str], object]) -> tuple[int, ...] | None:
    """Return the shape of a sample if the file's samples are rows of a table; else None.

    Raises:
        DataError: the file is damaged.
    """
    x = _load(path, say).get("x")
    return None if x is None or x.ndim != 2 else x.shape[1:]


def names_labels(path: Path) -> bool:
    """Return whether the file has labels.

    Raises:
        DataError: it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "y" in archive.files
    except _DAMAGE as error:
        raise DataError(f"cannot read {path}: {error or type(error).__name__}") from error


def read_ids(path: Path) -> dict[str, Tensor]:
    """Return the digests of the samples' ids, by part; none for a part that is not there.

    Raises:
        DataError: ids are missing, or do not fit the samples.
    """
    arrays, found = _load(path, lambda line: None), {}
    for part, suffix in PARTS.items():
        x, ids = arrays.get(f"x{suffix}"), arrays.get(f"ids{suffix}")
        count = None if x is None else x.shape[:1]
        if (None if ids is None else ids.shape) != count:
            raise DataError(
                f"{path}: clients that are joined need an array ids{suffix} that names each sample"
                f" of x{suffix}, of {0 if x is None else len(x)}; they are matched by it"
            )
        names = [] if ids is None else _texts(path, f"ids{suffix}", ids)
        try:
            found[part] = digests(names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return found


def read_npz(
    path: Path,
    spec: DatasetSpec,
    say: Callable[[str], object],
    *,
    any_range: bool,
    has_labels: bool = True,
    columns: Collection[str] = (),
) -> Parts:
    """Read the arrays, and say how they were read and what was left out.

    ``any_range`` accepts floats outside [0, 1]: the mean and std of the run then fit these data.
    Without ``has_labels``, all labels are 0. ``columns``: names of further labels.

    Raises:
        DataError: the file is damaged, an array is missing, or the samples do not fit.
    """
    arrays = _load(path, say, columns)
    if not has_labels:
        arrays = _without_labels(arrays)
    for suffix in PARTS.values():
        names = [name for name in (f"x{suffix}", f"y{suffix}") if name in arrays]
        if len(names) == 1 or (not names and not suffix):
            raise DataError(
                f"{path} has arrays {', '.join(arrays) or 'none'}; wanted are x and y,"
                " optionally x_val and y_val, x_test and y_test: each x with its y"
            )
    classes = _classes(path, arrays, spec)
    if alike := alike_among(classes):
        say(f"{path}: classes that look alike, but are different ones: {', '.join(alike)}")
    further_classes = {name: _classes_of_column(path, arrays, name) for name in columns}
    read = {}
    for part, suffix in PARTS.items():
        if f"x{suffix}" in arrays:
            x, how = _samples(path, f"x{suffix}", arrays, spec, any_range)
            y = _labels(path, f"y{suffix}", arrays, classes, suffix)
            counts = np.bincount(y, minlength=len(classes))
            told = ", ".join(f"{n} {name}" for name, n in zip(classes, counts, strict=True))
            shown = f"; classes: {told}" if has_labels else ""
            say(f"{path}: {len(y)} samples for {part} {how}{shown}")
            further = {
                name: torch.from_numpy(_labels(path, f"y_{name}{suffix}", arrays, theirs, suffix))
                for name, theirs in further_classes.items()
            }
            read[part] = Samples(torch.from_numpy(x), torch.from_numpy(y), further=further)
    return Parts(
        train=read["train"],
        validation=read.get("validation"),
        test=read.get("test", none_of(spec, columns)),
        classes=classes,
        columns=further_classes,
    )


def none_of(spec: DatasetSpec, columns: Collection[str]) -> Samples:
    """Return zero samples, with no labels in each column."""
    empty = nothing(spec.input_shape)
    return dataclasses.replace(empty, further=dict.fromkeys(columns, empty.y))


def _load(path: Path, say: Callable[[str], object], columns: Collection[str] = ()) -> Arrays:
    """Return the arrays that are known, with those of these further labels."""
    wanted = [*NAMES, *(f"classes_{name}" for name in columns)]
    wanted += [f"y_{name}{suffix}" for name in columns for suffix in PARTS.values()]
    try:
        with np.load(path, allow_pickle=False) as archive:
            others = [name for name in archive.files if name not in wanted]
            arrays = {name: np.asarray(archive[name]) for name in wanted if name in archive.files}
    except _DAMAGE as error:
        raise DataError(f"cannot read {path}: {error or type(error).__name__}") from error
    if others:
        say(f"{path}: left out: arrays {', '.join(others)}; read are {', '.join(arrays) or 'none'}")
    return arrays


def _without_labels(arrays: Arrays) -> Arrays:
    """Return arrays whose labels are all 0."""
    kept = {name: array for name, array in arrays.items() if not name.startswith(("y", "classes"))}
    xs = [name for name in kept if name.startswith("x")]
    return kept | {x.replace("x", "y"): np.zeros(len(kept[x]), np.int64) for x in xs}


def _texts(path: Path, name: str, array: np.ndarray) -> list[str]:
    """Return names that are given as text, as bytes in UTF-8, or as numbers."""
    try:
        return [n.decode() if isinstance(n, bytes) else str(n) for n in array.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {name} has names that are no text in UTF-8: {error}") from error


def _classes(path: Path, arrays: Arrays, spec: DatasetSpec) -> tuple[str, ...]:
    """Return the names of the classes: as given, else those in ``y``, else the data set's."""
    if "classes" not in arrays and arrays["y"].dtype.kind not in "SU":
        return spec.classes
    if "classes" not in arrays:
        return tuple(sorted(set(_texts(path, "y", arrays["y"]))))
    return _named_classes(path, "classes", arrays)


def _named_classes(path: Path, array: str, arrays: Arrays) -> tuple[str, ...]:
    """Return the names of classes that an array gives.

    Raises:
        DataError: one is given twice.
    """
    names = tuple(_texts(path, array, arrays[array]))
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"{path}: {array} names {', '.join(twice)} more than once")
    return names


def _classes_of_column(path: Path, arrays: Arrays, name: str) -> tuple[str, ...]:
    """Return the classes of further labels: as given, the names in them, or their numbers.

    Raises:
        DataError: there are no such labels.
    """
    if (given := f"classes_{name}") in arrays:
        return _named_classes(path, given, arrays)
    names = [f"y_{name}{suffix}" for suffix in PARTS.values()]
    found = [arrays[column] for column in names if column in arrays]
    if names[0] not in arrays:
        raise DataError(f"{path} has no array {names[0]}, which --tasks {name} needs")
    are_names = {y.dtype.kind in "SU" for y in found}
    if len(are_names) > 1:
        raise DataError(f"{path}: {', '.join(names)} are partly names and partly numbers")
    if are_names == {True}:
        return tuple(sorted({text for y in found for text in _texts(path, names[0], y)}))
    most = max((int(y.max()) for y in found if y.size and y.dtype.kind in "iu"), default=0)
    if most >= MOST_CLASSES:
        raise DataError(f"{path}: {names[0]} has the label {most}; at most {MOST_CLASSES} classes")
    return tuple(map(str, range(max(most + 1, 2))))


def _labels(
    path: Path, name: str, arrays: Arrays, classes: tuple[str, ...], suffix: str
) -> np.ndarray:
    """Return labels: (N,) int64."""
    x_name = f"x{suffix}"
    if name not in arrays:
        raise DataError(f"{path} has no array {name}, the labels of {x_name}")
    y = arrays[name]
    count = arrays[x_name].shape[:1]
    is_text = y.dtype.kind in "SU"
    if y.shape != count or not (is_text or np.issubdtype(y.dtype, np.integer)):
        raise DataError(
            f"{path}: {name} must hold one integer for each sample of {x_name}, or one name of a"
            f" class; it is {y.dtype} of shape {list(y.shape)}, {x_name} has {list(count)} samples"
        )
    if is_text:
        return _numbered(path, name, _texts(path, name, y), classes)
    if len(y) and not 0 <= y.min() <= y.max() < len(classes):
        raise DataError(
            f"{path}: {name} has labels {y.min()} to {y.max()}, but there are {len(classes)}"
            " classes"
        )
    return y.astype(np.int64)


def _numbered(path: Path, name: str, names: list[str], classes: tuple[str, ...]) -> np.ndarray:
    number = {name: label for label, name in enumerate(classes)}
    if foreign := sorted(set(names) - number.keys()):
        raise DataError(
            f"{path}: {name} has {listed(foreign, classes)}, which are none of the classes"
            f" {listed(classes, foreign)}"
        )
    return np.array([number[name] for name in names], np.int64)


def _samples(
    path: Path, name: str, arrays: Arrays, spec: DatasetSpec, any_range: bool
) -> tuple[np.ndarray, str]:
    """Return samples (uint8 or float32; images as (N, C, H, W)) and how they were read."""
    x, how = _channels_first(path, name, arrays[name], spec)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x), how
    if not np.issubdtype(x.dtype, np.floating):
        raise DataError(
            f"{path}: {name} is {x.dtype}; wanted is uint8, or floats in [0, 1] (of any range, if"
            " the server gives --normalize)"
        )
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(x).all() or not (any_range or ((x >= 0) & (x <= 1)).all()):
        wrong = "NaN or infinity" if any_range else "floats outside [0, 1], or NaN"
        raise DataError(
            f"{path}: {name} holds {wrong}; floats of another range are for a server with"
            " --normalize mean=M,std=S, or a data set of your own that has their mean and std"
        )
    return x, how


def _channels_first(
    path: Path, name: str, x: np.ndarray, spec: DatasetSpec
) -> tuple[np.ndarray, str]:
    """Return samples with channels first, not yet resized, and how they were read."""
    wanted, found = spec.input_shape, x.shape[1:]
    channels = wanted[0]
    if found == wanted:
        return x, f"of {list(found)}"
    forms: dict[str, np.ndarray | None] = {f"(N, {', '.join(map(str, wanted))})": None}
    if spec.has_images:
        is_4d = x.ndim == 4
        last = np.moveaxis(x, -1, 1) if is_4d and found[-1] == channels else None
        forms = {
            f"(N, {channels}, H, W)": x if is_4d and found[0] == channels else None,
            f"(N, H, W, {channels})": last,
        }
        if channels == 1:
            forms["(N, H, W)"] = x[:, np.newaxis] if x.ndim == 3 else None
    fitting = {form: images for form, images in forms.items() if images is not None}
    if len(fitting) != 1:
        wrong = "which may be" if fitting else "wanted are"
        texts = " or ".join(fitting or forms)
        raise DataError(f"{path}: {name} has samples of shape {list(found)}; {wrong} {texts}")
    ((form, images),) = fitting.items()
    how = f"of {list(found)}, read as {form}"
    if images.shape[1:] == wanted:
        return images, how
    check_resizable(images.shape[1:], wanted)
    return images, f"{how} and resized to {wanted[1]}x{wanted[2]}"
