"""HAM10000: dermatoscopic images of skin lesions (Tschandl et al. 2018, doi 10.7910/DVN/DBW86T).

::

    DIR/HAM10000/HAM10000_metadata.csv
                 HAM10000_images_part_1/ISIC_0024306.jpg ...
                 HAM10000_images_part_2/...

Many lesions have several images. All images of a lesion are either training or test samples, so
that no test image shows a lesion that was trained on.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sfl.data.cache import cached, new_array, signature
from sfl.data.client_data import Source
from sfl.data.images import read_images
from sfl.data.samples import Samples
from sfl.errors import DataError

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
METADATA = "HAM10000_metadata.csv"
PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
COLUMNS = ("lesion_id", "image_id", "dx")
TEST_SHARE = 5  # one in five lesions of each class is for testing


def load_ham10000(source: Source) -> tuple[Samples, Samples]:
    """Load the images of all lesions; every fifth lesion of a class, sorted by id, is for testing.

    Images are decoded and resized once; later loads read the cache.

    Raises:
        DataError: a file, a folder or a column is missing, or an image is damaged.
    """
    folder = source.folder / "HAM10000"
    if not (folder / METADATA).is_file():
        raise DataError(
            f"{folder / METADATA} is not there: get HAM10000 from doi 10.7910/DVN/DBW86T, unpack"
            f" its two parts, and give --data-dir the folder that has HAM10000/{METADATA},"
            f" HAM10000/{PARTS[0]} and HAM10000/{PARTS[1]}"
        )
    rows = read_metadata(folder)
    paths = _find_images(folder, [row["image_id"] for row in rows])
    _, height, width = source.input_shape

    def decode(into: Path) -> None:
        source.say(f"decoding {len(paths)} images to {width}x{height}; the next start reads them")
        stored = new_array(into / "x.npy", (len(paths), *source.input_shape))
        with tqdm(total=len(paths), desc="decoding", leave=False, disable=None) as bar:
            read_images(paths, stored, bar.update)
        stored.flush()

    name = f"ham10000-{width}x{height}"
    x = cached(
        source.cache, name, f"{source.input_shape}\n{signature(paths)}", {"x": len(paths)}, decode
    )["x"]
    samples = Samples(x, torch.tensor([CLASSES.index(row["dx"]) for row in rows]))
    tests = is_test(rows)
    return samples.take(~tests), samples.take(tests)


def read_metadata(folder: Path) -> list[dict[str, str]]:
    """Return a row for each image, with at least the columns that are read here.

    Raises:
        DataError: the file is missing or damaged, or a row makes no sense.
    """
    path = folder / METADATA
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}; wanted are {', '.join(COLUMNS)}"
                )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    class_of: dict[str, str] = {}
    images: set[str] = set()
    for number, row in enumerate(rows, 2):
        lesion, image, name = (row[column] for column in COLUMNS)
        wrong = ""
        if name not in CLASSES:
            wrong = f"{name!r} is no class; there are {', '.join(CLASSES)}"
        elif not lesion or not image:
            wrong = "no lesion_id or no image_id"
        elif image in images:
            wrong = f"the image {image} stands there twice"
        elif class_of.setdefault(lesion, name) != name:
            wrong = f"the lesion {lesion} is {name} here and {class_of[lesion]} before"
        if wrong:
            raise DataError(f"{path}, line {number}: {wrong}")
        images.add(image)
    if not rows:
        raise DataError(f"{path} names no images")
    return rows


def _find_images(folder: Path, names: Sequence[str]) -> list[Path]:
    found = {path.stem: path for part in PARTS for path in (folder / part).glob("*.jpg")}
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} images that {METADATA} names are neither in"
            f" {folder / PARTS[0]} nor in {PARTS[1]}; the first is {missing[0]}.jpg"
        )
    return [found[name] for name in names]


def is_test(rows: Sequence[Mapping[str, str]]) -> Tensor:
    """Return which images are test samples: (N,) bool."""
    class_of = {row["lesion_id"]: row["dx"] for row in rows}
    tests: set[str] = set()
    for name in CLASSES:
        lesions = sorted(lesion for lesion, of in class_of.items() if of == name)
        tests |= set(lesions[TEST_SHARE - 1 :: TEST_SHARE])
    return torch.tensor([row["lesion_id"] in tests for row in rows])
