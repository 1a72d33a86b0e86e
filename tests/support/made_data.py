"""Small data sets in the formats of the real ones, and how tests load a data set."""

import csv
import gzip
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from sfl.config import RunConfig
from sfl.data.client_data import Source, load
from sfl.data.datasets import dataset_spec
from sfl.data.samples import Samples
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate


def loaded(
    name: str,
    folder: Path = Path("nowhere"),
    say: Callable[[str], None] = print,
    cache: Path | None = None,
) -> tuple[Samples, Samples]:
    """Load a data set from a folder, with the cache in it."""
    spec = dataset_spec(name)
    return load(spec, Source(folder, cache or folder / "cache", spec.input_shape, say))


def _write_idx(folder: Path, prefix: str, names: tuple[str, str], labels: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(labels)
    pixels = np.arange(count * 784, dtype=np.uint64).astype(np.uint8)
    images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()
    (folder / f"{prefix}-{names[0]}").write_bytes(images)
    (folder / f"{prefix}-{names[1]}").write_bytes(struct.pack(">II", 0x801, count) + bytes(labels))


def write_mnist(root: Path, name: str, sizes: tuple[int, int]) -> None:
    """Write a data set in MNIST's format; its pixels count on from 0."""
    for prefix, count in zip(("train", "t10k"), sizes, strict=True):
        labels = [k % 10 for k in range(count)]
        names = ("images-idx3-ubyte", "labels-idx1-ubyte")
        _write_idx(root / name / "raw", prefix, names, labels)


def write_emnist(
    root: Path, split: str, first: int, num_classes: int, sizes: tuple[int, int]
) -> None:
    """Write a split of EMNIST, with labels from ``first`` on."""
    for prefix, count in zip(("train", "test"), sizes, strict=True):
        labels = [first + k % num_classes for k in range(count)]
        names = ("images-idx3-ubyte", "labels-idx1-ubyte")
        _write_idx(root / "EMNIST" / "raw", f"emnist-{split}-{prefix}", names, labels)


def write_cifar(root: Path, folder: str, files: Mapping[str, int], label_key: str) -> None:
    """Write a data set in CIFAR's format: so many images into each file, red counting on from 0."""
    (root / folder).mkdir(parents=True)
    for name, count in files.items():
        pixels = np.zeros((count, 3, 1024), np.uint8)
        pixels[:, 0] = np.arange(count * 1024).reshape(count, 1024) % 256
        content = {"data": pixels.reshape(count, 3072), label_key: [k % 10 for k in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(content))


def write_femnist(root: Path, samples: Mapping[str, int], tests: Mapping[str, int]) -> None:
    """Write so many characters of each writer; those of a writer all have one grey."""
    writers = sorted({*samples, *tests})
    for part, counts in (("train", samples), ("test", tests)):
        folder = root / "FEMNIST" / "data" / part
        folder.mkdir(parents=True)
        data = {
            writer: {
                "x": [[(10 * writers.index(writer) + 5) / 255] * 783 + [1.0]] * count,
                "y": [k % 62 for k in range(count)],
            }
            for writer, count in counts.items()
        }
        content = {"users": list(counts), "num_samples": list(counts.values()), "user_data": data}
        (folder / "all_data.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))


def write_ham10000(root: Path, num_lesions: int = 70, images_of_a_lesion: int = 2) -> None:
    """Write the official folders, with lesions of every class in turn, each of one colour."""
    classes = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    folder = root / "HAM10000"
    rows = []
    for part in (1, 2):
        (folder / f"HAM10000_images_part_{part}").mkdir(parents=True)
    for lesion in range(num_lesions):
        for k in range(images_of_a_lesion):
            name = f"ISIC_{lesion * images_of_a_lesion + k:07d}"
            colour = ((3 * lesion + 1) % 256, 128, 40 * k)
            path = folder / f"HAM10000_images_part_{1 + lesion % 2}" / f"{name}.jpg"
            Image.new("RGB", (60, 45), colour).save(path, quality=95)
            about = ["histo", "" if lesion == 3 else f"{lesion}.0", ("male", "female")[lesion % 2]]
            rows.append(
                [f"HAM_{lesion:07d}", name, classes[lesion % 7], *about, f"place {lesion % 5}"]
            )
    with open(folder / "HAM10000_metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"])
        writer.writerows(rows)


def trains(tmp_path: Path, dataset: str, **options: object) -> Path:
    """Train one round of three clients on what lies in a folder."""
    run = RunConfig(dataset=dataset, rounds=1, run="r", **options)  # type: ignore[arg-type]
    node = NodeConfig(
        data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), out=str(tmp_path / "out")
    )
    return simulate(run, node)


def write_own(folder: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 40) -> Path:
    """Write noisy images with a bright band whose place tells the class."""
    folder.mkdir()
    labels = np.arange(count) % len(classes)
    images = np.random.default_rng(1).integers(0, 60, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 190
    np.savez(folder / "own.npz", x=images, y=labels, classes=np.array(classes))
    return folder
