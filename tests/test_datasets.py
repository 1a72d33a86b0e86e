"""Data sets in the formats in which their owners give them out, and what is wrong with bad ones."""

import gzip
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import datasets

from sfl.config import NodeConfig, RunConfig
from sfl.data import part_of
from sfl.datasets import DATASETS
from sfl.errors import DataError, SflError
from sfl.simulate import simulate
from tests.made_data import (
    loaded,
    write_cifar,
    write_emnist,
    write_femnist,
    write_ham10000,
    write_mnist,
)


def trains(tmp_path: Path, dataset: str, **options: object) -> Path:
    """Train one round of three clients on what lies in a folder."""
    run = RunConfig(dataset=dataset, rounds=1, run="r", **options)  # type: ignore[arg-type]
    node = NodeConfig(
        data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), out=str(tmp_path / "out")
    )
    return simulate(run, node)


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
    write_mnist(tmp_path, "MNIST", (30, 20))
    train, test = loaded("mnist", tmp_path, side=64)
    assert (train.x.shape, test.x.shape, train.x.dtype) == (
        (30, 1, 64, 64), (20, 1, 64, 64), torch.uint8,
    )  # fmt: skip
    small = loaded("mnist", tmp_path)[0]
    mean = small.x[0].float().mean()
    assert abs(train.x[0].float().mean() - mean) < 2
    run = trains(tmp_path, "mnist", model="lenet5", image_size=40, batch_size=4)
    assert json.loads((run / "environment.json").read_text())["data"]["input_shape"] == [1, 40, 40]


# ---- FEMNIST


WRITERS = {f"f{k:04d}": 4 + 3 * k for k in range(9)}
TESTERS = {f"f{k:04d}": 1 + k % 3 for k in range(11)}  # two of whom have nothing to train on


def test_femnist_keeps_leafs_white_background(tmp_path: Path) -> None:
    write_femnist(tmp_path, WRITERS, TESTERS)
    said: list[str] = []
    train, test = loaded("femnist", tmp_path, said.append)
    assert (len(train), len(test)) == (sum(WRITERS.values()), sum(TESTERS.values()))
    assert train.x[0, 0, 0, :3].tolist() == [5, 5, 5]
    assert train.x[0, 0, 27, 27] == 255
    assert train.y[:4].tolist() == [0, 1, 2, 3]
    assert DATASETS["femnist"].background == 1.0
    assert len(said) == 1
    again, _ = loaded("femnist", tmp_path, said.append)
    assert len(said) == 1
    assert torch.equal(again.x, train.x)


def test_each_writer_is_one_clients_alone(tmp_path: Path) -> None:
    write_femnist(tmp_path, WRITERS, TESTERS)
    both = loaded("femnist", tmp_path)
    for clients in (3, 9):
        run = RunConfig(dataset="femnist", partition="writer", clients=clients)
        parts = [part_of(DATASETS["femnist"], run, k, both) for k in range(clients)]
        own = []
        for part in parts:
            trained = torch.cat([part.train.x, part.validation.x]).flatten(1)[:, 0] // 10
            tested = part.test.x.flatten(1)[:, 0] // 10
            assert set(tested.tolist()) >= set(trained.tolist())
            own.append(set(trained.tolist()) | set(tested.tolist()))
        assert sorted(w for writers in own for w in writers) == list(range(11))
        sizes = [len(part.train) + len(part.validation) for part in parts]
        assert sum(sizes) == sum(WRITERS.values())
    assert min(sizes) == 4  # a client with 4 samples trains, and has none for validation
    run_dir = trains(tmp_path, "femnist", partition="writer", clients=9, model="mlp")
    assert (run_dir / "models/client_8_000.pt").exists()


def test_writers_are_needed_and_enough_of_them(tmp_path: Path) -> None:
    write_femnist(tmp_path, WRITERS, TESTERS)
    with pytest.raises(DataError, match="9 writers for 10 clients"):
        trains(tmp_path, "femnist", partition="writer", clients=10)
    with pytest.raises(SflError, match="mnist-5k does not say who made its samples"):
        trains(tmp_path, "mnist-5k", partition="writer")
    with pytest.raises(SflError, match="the data set does not say who made its samples"):
        trains(tmp_path, "tests.test_data:small", partition="writer", cut=3)


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(gzip.decompress(path.read_bytes()))
    change(content)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def of_first_writer(name: str, values: object) -> Callable[[dict[str, object]], object]:
    return lambda content: content["user_data"]["f0000"].update({name: values})  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("users"), "is damaged or not LEAF's: KeyError 'users'"),
        (of_first_writer("y", [0, 1, 2]), r"writer f0000 has x of shape \[4, 784\] and y of"),
        (of_first_writer("y", [0, 1, 2, 62]), "labels outside 0 to 61"),
        (of_first_writer("y", [0, 1, 2, 0.5]), r"wanted are \[N, 784\] and \[N\] integers"),
        (of_first_writer("x", [[0.5] * 784] * 3 + [[0.5] * 783]), "is damaged or not LEAF's"),
        (of_first_writer("x", [[2.0] * 784] * 4), r"pixels that are not k/255 in \[0, 1\]"),
        (of_first_writer("x", [[0.1234] * 784] * 4), r"pixels that are not k/255 in \[0, 1\]"),
    ],
)
def test_a_damaged_femnist_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, object]], object], reason: str
) -> None:
    write_femnist(tmp_path, WRITERS, TESTERS)
    rewrite(tmp_path / "FEMNIST/data/train/all_data.json.gz", change)
    with pytest.raises(DataError, match=reason) as caught:
        loaded("femnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("femnist-*")) == []


def test_a_femnist_that_is_cut_off_or_away_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.json or \.json\.gz in .*FEMNIST/data/train"):
        loaded("femnist", tmp_path)
    write_femnist(tmp_path, WRITERS, TESTERS)
    path = tmp_path / "FEMNIST/data/test/all_data.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"test/all_data.json.gz is damaged or not LEAF's: EOFErr"):
        loaded("femnist", tmp_path)


# ---- HAM10000


def test_ham10000_is_split_by_lesion(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    train, test = loaded("ham10000", tmp_path)
    assert (len(train), len(test)) == (112, 28)
    assert train.x.shape[1:] == (3, 64, 64)
    assert torch.bincount(test.y).tolist() == [4] * 7  # every fifth of ten lesions, two images each
    assert train.y[:3].tolist() == [0, 0, 1]
    lesions = [set((s.x[:, 0, 32, 32] // 3).tolist()) for s in (train, test)]  # by their colour
    assert len(lesions[0]) == 56
    assert len(lesions[1]) == 14
    assert not lesions[0] & lesions[1]


def test_ham10000_is_decoded_once_for_each_size(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    said: list[str] = []
    train, test = loaded("ham10000", tmp_path, said.append)
    assert train.stored.data_ptr() == test.stored.data_ptr()  # one file, mapped
    again, _ = loaded("ham10000", tmp_path, said.append)
    assert said == ["decoding 140 images to 64x64; the next start reads them"]
    assert torch.equal(again.x, train.x)
    small, _ = loaded("ham10000", tmp_path, said.append, side=32)
    assert small.x.shape[1:] == (3, 32, 32)
    assert len(said) == 2
    # Who writes into it, writes into a copy of its own.
    again.stored[:] = 0
    assert torch.equal(loaded("ham10000", tmp_path, said.append)[0].x, train.x)
    # An image that is replaced is decoded.
    path = next((tmp_path / "HAM10000/HAM10000_images_part_1").glob("*.jpg"))
    Image.new("RGB", (60, 45), (1, 2, 3)).save(path)
    loaded("ham10000", tmp_path, said.append)
    assert len(said) == 3


def test_ham10000_trains_with_weights_of_its_classes(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    run = trains(tmp_path, "ham10000", model="lenet5", class_weights="balanced")
    weights = json.loads((run / "environment.json").read_text())["data"]["class_weights"]
    assert len(weights) == 7
    assert all(0.5 < weight < 2 for weight in weights)


def cut_image(folder: Path) -> None:
    path = folder / "HAM10000_images_part_1/ISIC_0000000.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def replace_in_metadata(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "HAM10000_metadata.csv"
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "HAM10000_metadata.csv").unlink(), "doi 10.7910/DVN/DBW86T"),
        (replace_in_metadata("lesion_id", "lesion"), r"has no column lesion_id; wanted are"),
        (replace_in_metadata(",vasc,", ",wart,"), r"line 14: 'wart' is no class; there are akiec"),
        (lambda folder: (folder / "HAM10000_images_part_1/ISIC_0000000.jpg").unlink(),
         r"1 of 140 images .* the first is ISIC_0000000.jpg"),
        (cut_image, r"cannot read the image .*ISIC_0000000.jpg: .*[Tt]runcated"),
        (lambda folder: (folder / "HAM10000_metadata.csv").write_bytes(b"\xff\xfe\x00\x01"),
         "cannot read .*HAM10000_metadata.csv"),
        (lambda folder: (folder / "HAM10000_metadata.csv").write_text("lesion_id,image_id,dx\n"),
         "names no images"),
        (lambda folder: (folder / "HAM10000_metadata.csv").write_text("lesion_id,image_id,dx\na\n"),
         "line 2: None is no class"),
    ],
)  # fmt: skip
def test_a_bad_ham10000_is_one_line(
    tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    write_ham10000(tmp_path)
    change(tmp_path / "HAM10000")
    with pytest.raises(DataError, match=reason) as caught:
        loaded("ham10000", tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("ham10000-64x64-*")) == []


# ---- the cache


def test_a_cache_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write or read the cache .*; --cache-dir may"):
        loaded("ham10000", tmp_path)
    (tmp_path / "cache").unlink()
    train, _ = loaded("ham10000", tmp_path)
    (path,) = (tmp_path / "cache").glob("ham10000-64x64-*/x.npy")
    whole = path.read_bytes()
    del train
    path.write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"the cache .* is damaged \(.*\); remove it"):
        loaded("ham10000", tmp_path)


def test_what_a_killed_process_left_in_the_cache_is_not_read(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    loaded("ham10000", tmp_path)
    (whole,) = (tmp_path / "cache").glob("ham10000-64x64-*")
    partial = whole.rename(whole.with_suffix(".partial"))
    (partial / "x.npy").write_bytes(b"half")
    train, _ = loaded("ham10000", tmp_path)
    assert len(train) == 112
    assert not partial.exists()
