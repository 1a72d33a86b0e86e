"""Data sets in the formats in which their owners give them out, and what is wrong with bad ones."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from sfl.config import RunConfig
from sfl.data.cache import one_at_a_time
from sfl.data.client_data import DatasetSpec, Source, load, part_of
from sfl.data.datasets import DATASETS, dataset_of
from sfl.data.samples import Samples
from sfl.errors import DataError
from tests.support.made_data import (
    loaded,
    trains,
    write_cifar,
    write_emnist,
    write_mnist,
)

# ---- EMNIST and CIFAR


@pytest.mark.parametrize(
    ("name", "split", "first", "classes"),
    [
        ("emnist", "balanced", 0, 47),
        ("emnist-byclass", "byclass", 0, 62),
        ("emnist-letters", "letters", 1, 26),
        ("emnist-digits", "digits", 0, 10),
    ],
)
def test_emnist(tmp_path: Path, name: str, split: str, first: int, classes: int) -> None:
    write_emnist(tmp_path, split, first, classes, (130, 70))
    train, test = loaded(name, tmp_path)
    assert (train.x.shape, test.x.shape) == ((130, 1, 28, 28), (70, 1, 28, 28))
    assert train.y[:3].tolist() == [0, 1, 2]
    assert train.y.max() == classes - 1 == len(DATASETS[name].classes) - 1
    assert train.x[0, 0, :3, 0].tolist() == [0, 1, 2]  # columns in the file, rows in an image
    if split != "letters":  # torchvision gives letters a class 0, "N/A"
        classes_there = datasets.EMNIST(tmp_path, split=split).classes
        assert list(DATASETS[name].classes) == classes_there
    assert (trains(tmp_path, name, model="mlp", batch_size=8) / "rounds.csv").exists()


CIFAR10 = {f"data_batch_{k}": 20 for k in range(1, 6)}
MADE = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR10, {"test_batch": 30}, "labels"),
    "cifar100": ("CIFAR100", "cifar-100-python", {"train": 100}, {"test": 30}, "fine_labels"),
}


def make_cifar(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small data set in the format, and let torchvision take its checksums for right."""
    class_name, folder, train, test, label_key = MADE[name]
    made = getattr(datasets, class_name)
    write_cifar(tmp_path, folder, {**train, **test}, label_key)
    key = "label_names" if name == "cifar10" else "fine_label_names"
    meta = tmp_path / folder / made.meta["filename"]
    meta.write_bytes(pickle.dumps({key: list(DATASETS[name].classes)}))

    def sums(files: list[str]) -> list[list[str]]:
        digests = (hashlib.md5((tmp_path / folder / f).read_bytes()).hexdigest() for f in files)
        return [list(pair) for pair in zip(files, digests, strict=True)]

    monkeypatch.setattr(made, "train_list", sums(list(train)))
    monkeypatch.setattr(made, "test_list", sums(list(test)))
    monkeypatch.setattr(
        made, "meta", {**made.meta, "md5": hashlib.md5(meta.read_bytes()).hexdigest()}
    )
    return tmp_path / folder


@pytest.mark.parametrize("name", MADE)
def test_cifar(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_cifar(tmp_path, name, monkeypatch)
    train, test = loaded(name, tmp_path)
    assert (train.x.shape, test.x.shape) == ((100, 3, 32, 32), (30, 3, 32, 32))
    assert train.y[:12].tolist() == [*range(10), 0, 1]
    assert train.x[0, 0, 1, :3].tolist() == [32, 33, 34]  # red first, row by row
    assert train.x[0, 1:].sum() == 0
    assert (trains(tmp_path, name, model="lenet5", batch_size=8) / "rounds.csv").exists()
    (folder / next(iter(MADE[name][3]))).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{folder.name} is damaged: .*; remove it"):
        loaded(name, tmp_path)


def test_there_are_as_many_classes_as_the_data_sets_have() -> None:
    wanted = {"mnist": 10, "cifar10": 10, "cifar100": 100, "femnist": 62, "ham10000": 7}
    assert {name: len(set(DATASETS[name].classes)) for name in wanted} == wanted
    assert list(DATASETS["cifar100"].classes) == sorted(DATASETS["cifar100"].classes)


def test_images_come_in_the_size_that_is_asked_for(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST", (40, 20))
    both = loaded("mnist", tmp_path)
    run = RunConfig(dataset="mnist", image_size=64)
    parts = [part_of(dataset_of(run), run, k, both) for k in range(3)]
    small = part_of(DATASETS["mnist"], run, 0, both)
    assert [p.test.x.shape for p in parts] == [(7, 1, 64, 64), (7, 1, 64, 64), (6, 1, 64, 64)]
    assert parts[0].train.x.dtype == torch.uint8
    assert torch.equal(parts[0].train.y, small.train.y)
    for ours, source in zip(parts[0].train.x, small.train.x, strict=True):
        wanted = torch.nn.functional.interpolate(
            source[None].float(), (64, 64), mode="bilinear", antialias=True
        )
        assert (ours - wanted[0]).abs().max() <= 1
    run_dir = trains(tmp_path, "mnist", model="lenet5", image_size=40, batch_size=4)
    data = json.loads((run_dir / "environment.json").read_text())["data"]
    assert data["input_shape"] == [1, 40, 40]


def test_a_colour_batch_is_normalised_by_channel() -> None:
    spec = DATASETS["cifar10"]
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    samples = Samples(pixels, torch.arange(40) % 10)
    data = part_of(spec, RunConfig(augment="none"), 0, (samples, samples))
    x, _ = data.batch(data.test, slice(0, 3))
    for channel in range(3):
        wanted = data.test.x[:3, channel] / 255 - spec.mean[channel]  # type: ignore[index]
        assert torch.allclose(x[:, channel], wanted / spec.std[channel], atol=1e-5)  # type: ignore[index]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "numpy": (lambda: np.zeros((8, 1, 28, 28)), "no sfl.data.samples.Samples"),
    "counts": (lambda: Samples(X8, Y8[:5]), r"8 samples, and labels \[5\]"),
    "floats": (lambda: Samples(X8, Y8.float()), "wanted is int64"),
    "negative": (lambda: Samples(X8, Y8 - 1), "labels -1 to 0, of 2 classes"),
    "many": (lambda: Samples(X8, Y8 + 200), "labels 200 to 201, of 2 classes"),
    "double": (lambda: Samples(X8.double(), Y8), "x is torch.float64"),
    "colour": (lambda: Samples(X8.expand(-1, 3, -1, -1), Y8), r"samples of shape \[3, 28, 28\]"),
}
X8, Y8 = torch.zeros(8, 1, 28, 28), torch.arange(8) % 2


@pytest.mark.parametrize("name", WRONG)
def test_a_data_set_that_is_not_what_it_must_be_is_one_line(name: str) -> None:
    make, reason = WRONG[name]
    spec = DatasetSpec(lambda source: (make(), make()), (1, 28, 28), ("a", "b"), 0.0, 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match=rf"training samples of the data set are wrong: .*{reason}"):
        load(spec, Source(Path(), Path(), (1, 28, 28)))


@pytest.mark.slow
def test_clients_wait_for_the_one_that_downloads(tmp_path: Path) -> None:
    """What is there half while another process brings it is not damaged."""
    write_mnist(tmp_path / "whole", "MNIST", (30, 20))
    raw = tmp_path / "MNIST/raw"
    shutil.copytree(tmp_path / "whole/MNIST/raw", raw)
    labels = raw / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:9])
    with one_at_a_time(tmp_path / ".sfl-download.lock"):
        waiting = multiprocessing.get_context("forkserver").Process(
            target=loaded, args=("mnist", tmp_path)
        )
        waiting.start()
        waiting.join(2)
        assert waiting.is_alive()
        labels.write_bytes(whole)
    waiting.join(60)
    assert waiting.exitcode == 0
