"""A client's own images in one folder for each class.

::

    DIR/<class>/*.png ...          no test set; a fifth is held out for validation

    DIR/train/<class>/*.png ...
    DIR/val/<class>/*.png ...      optional: the validation part
    DIR/test/<class>/*.png ...     optional: the test set
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sfl.data.class_names import alike_among, listed
from sfl.data.client_data import DatasetSpec
from sfl.data.images import read_images
from sfl.data.samples import Parts, Samples, nothing
from sfl.errors import DataError, counted

Say = Callable[[str], object]
PARTS = TRAIN, VALIDATION, TEST = "train", "val", "test"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_HIDDEN = "hidden or of the system"
MOST_NAMED = 3  # names in the list of files left out for one reason
# Other layouts' names for a part: a folder of such a name that holds folders is not a class.
_LIKE_PARTS = frozenset({*PARTS, "training", "valid", "validation", "testing"})
# Files and folders that operating systems create, besides those that start with a dot.
_OF_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
     "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)  # fmt: skip
LAYOUT = (
    "wanted are DIR/<class>/<image>.png, or DIR/train/<class>/<image>.png with, if you like,"
    " DIR/val/<class>/... and DIR/test/<class>/..., in small letters; or an .npz file"
)


def read_folders(data_dir: Path, spec: DatasetSpec, say: Say) -> Parts:
    """Read the images of all classes, and say for each class what was read and what was left out.

    Raises:
        DataError: the layout is another, an image is damaged, or the data set has no images.
    """
    if not spec.has_images or spec.input_shape[0] not in (1, 3):
        raise DataError(
            f"{data_dir} is a folder, but samples of the data set, {list(spec.input_shape)}, are no"
            " grey or coloured images: give --data-dir an .npz file"
        )
    channels, height, width = spec.input_shape
    names = _parts(data_dir, say)
    classes = _classes(data_dir / names[0], say)
    colour = "grey" if channels == 1 else "in colour"
    say(f"{data_dir}: images are read {colour}, as {width}x{height} pixels")
    read = {name: _read_part(data_dir, name, classes, spec, say) for name in names}
    return Parts(
        train=read[names[0]],
        validation=read.get(VALIDATION),
        test=read.get(TEST, nothing(spec.input_shape)),
        classes=classes,
    )


def is_of_system(path: Path) -> bool:
    """Return whether a file or folder is hidden or made by the operating system."""
    return path.name.startswith(".") or path.name.casefold() in _OF_SYSTEMS


def sort_out(folder: Path, why_not: Callable[[Path], str]) -> tuple[list[Path], str]:
    """Return the paths of a folder to read, sorted by name, and a text on what is left out and why.

    ``why_not`` returns why a path is left out, or "".

    Raises:
        DataError: the folder cannot be read.
    """
    kept: list[Path] = []
    left: dict[str, list[str]] = {}
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if reason := why_not(path):
                left.setdefault(reason, []).append(path.name)
            else:
                kept.append(path)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    return kept, _left_out(left)


def _left_out(left: Mapping[str, Sequence[str]]) -> str:
    if not left:
        return ""
    texts = (f"{len(names)} {reason} ({_some(names)})" for reason, names in left.items())
    return f"left out: {', '.join(texts)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:MOST_NAMED], *["..."] * (len(names) > MOST_NAMED)])


def why_no_class(path: Path) -> str:
    """Return why a path among the classes' folders is not read; "" if it is a class."""
    if is_of_system(path):
        return _HIDDEN
    return "" if path.is_dir() else "beside the folders of the classes"


def why_no_image(path: Path) -> str:
    """Return why a path in a class's folder is not read; "" if it is an image."""
    from PIL import Image

    suffix = path.suffix.lower()
    if is_of_system(path):
        return _HIDDEN
    if path.is_dir():
        return "in a folder of its own: only what lies in the class's folder itself is read"
    if not path.is_file():
        return "no file, or a link that leads nowhere"
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in Image.registered_extensions():
        return "of a format that is not read: convert to .png"
    return "no image by its suffix"


def _parts(data_dir: Path, say: Say) -> tuple[str, ...]:
    """Return the names of the parts' folders; ("",) if the classes lie in DIR itself.

    Raises:
        DataError: a folder seems to be a part but is not named like one.
    """
    folders = {path.name: path for path in sort_out(data_dir, why_no_class)[0]}
    has_parts = TRAIN in folders and (
        folders.keys() == {TRAIN}
        or not folders.keys().isdisjoint({VALIDATION, TEST})
        or bool(sort_out(folders[TRAIN], why_no_class)[0])  # else a class has this name: trains
    )
    for name, path in folders.items():
        if name.casefold() not in _LIKE_PARTS or (has_parts and name in PARTS):
            continue
        if has_parts or _holds_folders(path):
            raise DataError(f"{path} looks like a part of the data, but is none: {LAYOUT}")
    if not has_parts:
        return ("",)
    beside = sort_out(data_dir, lambda path: "" if path.name in PARTS else "beside train/")[1]
    if beside:
        say(f"{data_dir}: {beside}")
    return tuple(name for name in PARTS if name in folders)


def _holds_folders(folder: Path) -> bool:
    """Return whether a folder holds folders and no images."""
    return bool(sort_out(folder, why_no_class)[0]) and not sort_out(folder, why_no_image)[0]


def _classes(folder: Path, say: Say) -> tuple[str, ...]:
    """Return the names of the classes: those of their folders.

    Raises:
        DataError: there are none.
    """
    names = tuple(path.name for path in sort_out(folder, why_no_class)[0])
    if not names:
        raise _no_class(folder)
    if alike := alike_among(names):
        say(f"{folder}: classes that look alike, but are different ones: {', '.join(alike)}")
    return names


def _no_class(folder: Path) -> DataError:
    num_images = len(sort_out(folder, why_no_image)[0])
    if num_images:  # file names may be private: this message reaches the server
        return DataError(
            f"{folder} has {counted(num_images, 'image')}, but no folder says of which class;"
            f" {LAYOUT}"
        )
    return DataError(f"{folder} is empty: put one folder of images a class there; {LAYOUT}")


def _read_part(
    data_dir: Path, name: str, classes: tuple[str, ...], spec: DatasetSpec, say: Say
) -> Samples:
    """Read the images of one part."""
    folder = data_dir / name
    found, beside = sort_out(folder, why_no_class)
    names = [path.name for path in found]
    if foreign := [n for n in names if n not in classes]:
        raise DataError(
            f"{folder} has classes that {data_dir / TRAIN} lacks: {', '.join(foreign)}; it has"
            f" {listed(names, classes)}, {TRAIN}/ {listed(classes, names)}"
        )
    if not names and sort_out(folder, why_no_image)[0]:
        raise _no_class(folder)
    if beside:
        say(f"{folder}: {beside}")
    sorted_out = [sort_out(folder / n, why_no_image) if n in names else ([], "") for n in classes]
    counts = [len(paths) for paths, _ in sorted_out]
    x = np.empty((sum(counts), *spec.input_shape), np.uint8)
    rows = np.split(x, np.cumsum(counts)[:-1])
    for label, (paths, left) in enumerate(sorted_out):
        notes = read_images(paths, rows[label])
        told = [f"{count} {note}" for note, count in sorted(notes.items())]
        read = "; ".join([f"{counted(len(paths), 'image')} read", *told, *[left] * bool(left)])
        say(f"{Path(name, classes[label])}/: {read}")
    y = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return Samples(torch.from_numpy(x), y)
