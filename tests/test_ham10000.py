"""HAM10000 from its official folders: lesions, the cache, and what is wrong with bad folders."""

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.ham10000_parties.files import write_files
from sfl.config import RunConfig
from sfl.data.client_data import Source, load
from sfl.data.datasets import DATASETS
from sfl.errors import DataError
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from tests.support.made_data import (
    loaded,
    trains,
    write_ham10000,
)


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


def test_ham10000_is_divided_between_two_parties(tmp_path: Path) -> None:
    """Images and labels at one, metadata at the other, of the same lesions by their ids."""
    write_ham10000(tmp_path)
    assert len(list(write_files(tmp_path, tmp_path / "cache", tmp_path / "own", 32))) == 2
    images, table = (np.load(tmp_path / f"own/client_{k}/ham10000.npz") for k in (0, 1))
    assert sorted(images["ids"]) == sorted(table["ids"])
    assert sorted(images["ids_test"]) == sorted(table["ids_test"])
    lesion = {name: int(name.removeprefix("ISIC_")) // 2 for name in images["ids"]}
    for name, image in zip(images["ids"], images["x"], strict=True):
        assert abs(int(image[0, 16, 16]) - (3 * lesion[name] + 1)) < 6
    for name, row in zip(table["ids"], table["x"], strict=True):
        known = lesion[name] != 3
        assert row[:2].tolist() == [np.float32(lesion[name] / 100) if known else 0, known]
        assert row[2:4].tolist() == [lesion[name] % 2, 1 - lesion[name] % 2]  # female, male
        assert row[4:].argmax() == lesion[name] % 5
    run = RunConfig(
        topology="vertical", partition="own", dataset="ham10000", image_size=32, clients=2,
        rounds=1, model="cnn-cifar10", cut=9, party_models="cnn-cifar10,mlp", run="r",
    )  # fmt: skip
    node = NodeConfig(out=str(tmp_path), data_dir=str(tmp_path / "own"))
    log = (simulate(run, node) / "server_log.txt").read_text()
    assert "samples that all clients have: 112 train, 0 validation, 28 test" in log


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


@pytest.mark.slow
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
