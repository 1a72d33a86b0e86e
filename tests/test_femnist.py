"""FEMNIST in LEAF's JSON: writers, the white background, and what is wrong with bad files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.data.client_data import part_of
from sfl.data.datasets import DATASETS
from sfl.errors import DataError, SflError
from tests.support.made_data import (
    loaded,
    trains,
    write_femnist,
)

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


def test_what_another_system_puts_beside_the_files_is_not_read(tmp_path: Path) -> None:
    write_femnist(tmp_path, WRITERS, TESTERS)
    (tmp_path / "FEMNIST/data/train/._all_data.json").write_bytes(b"\0\5\x16\7")
    assert len(loaded("femnist", tmp_path)[0]) == sum(WRITERS.values())


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
