"""Data sets in the formats in which their owners give them out, and what is wrong with bad ones."""

import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from sfl.cache import one_at_a_time
from sfl.config import NodeConfig, RunConfig
from sfl.data import DatasetSpec, Source, load, part_of
from sfl.datasets import DATASETS, dataset_of
from sfl.errors import DataError, SflError
from sfl.samples import Samples
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
    "numpy": (lambda: np.zeros((8, 1, 28, 28)), "no sfl.samples.Samples"),
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
        (lambda content: content.update(users=[]), "train names no writers"),
        (of_first_writer("y", [0, 1, 2]), r"writer 'f0000' has x of shape \[4, 784\] and y of"),
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
    source = Source(tmp_path, tmp_path / "cache", (3, 32, 32), said.append)
    small, _ = load(DATASETS["ham10000"].sized(32), source)
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
    os.utime(path, (1, 1))  # another of the same size, perhaps
    loaded("ham10000", tmp_path, said.append)
    assert len(said) == 4


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
        (replace_in_metadata("HAM_0000003", ""), "line 8: no lesion_id or no image_id"),
        (replace_in_metadata("ISIC_0000003", "ISIC_0000002"), "line 5: the image .* twice"),
        (replace_in_metadata("HAM_0000001", "HAM_0000000"), "line 4: the lesion .* is bcc here"),
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


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write the cache .*; --cache-dir may"):
        loaded("ham10000", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: np.save(path, np.zeros((5, 3, 64, 64), np.uint8)),
    ],
)
def test_a_damaged_cache_is_one_line(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    write_ham10000(tmp_path)
    loaded("ham10000", tmp_path)
    (path,) = (tmp_path / "cache").glob("ham10000-64x64-*/x.npy")
    damage(path)
    with pytest.raises(DataError, match=r"the cache .* is damaged \(.*\); remove it"):
        loaded("ham10000", tmp_path)


def test_a_full_disk_under_the_cache_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ham10000(tmp_path)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot write the cache .*: No space left on device"):
        loaded("ham10000", tmp_path)
    assert list((tmp_path / "cache").glob("ham10000-64x64-*")) == []


def test_of_clients_that_start_at_once_one_decodes(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    (tmp_path / "said").mkdir()
    context = multiprocessing.get_context("forkserver")
    starts = [context.Process(target=_load_and_note, args=(tmp_path, k)) for k in range(4)]
    for process in starts:
        process.start()
    for process in starts:
        process.join(60)
    assert [process.exitcode for process in starts] == [0] * 4
    said = [path.read_text() for path in (tmp_path / "said").iterdir()]
    assert len(said) == 4
    assert sum("decoding" in text for text in said) == 1


def _load_and_note(folder: Path, k: int) -> None:
    said: list[str] = []
    train, _ = loaded("ham10000", folder, said.append)
    assert len(train) == 112
    (folder / "said" / str(k)).write_text(" ".join(said))


def test_what_a_killed_process_left_in_the_cache_is_not_read(tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    loaded("ham10000", tmp_path)
    (whole,) = (tmp_path / "cache").glob("ham10000-64x64-*")
    partial = whole.rename(whole.with_suffix(".partial"))
    (partial / "x.npy").write_bytes(b"half")
    train, _ = loaded("ham10000", tmp_path)
    assert len(train) == 112
    assert not partial.exists()
