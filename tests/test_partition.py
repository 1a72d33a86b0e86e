"""Partitions: disjoint, covering, dependent on the seed alone, and as skewed as they say."""

from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.data.partition import MIN_SAMPLES, check_partition, partition
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from tests.support.programs import run_program

LABELS = torch.arange(3000) % 10
WRITERS = torch.arange(3000) // 37
SAMPLES = Samples(torch.arange(3000), LABELS, WRITERS)
ALL = ["iid", "sizes:0.1,0.2,0.3,0.4", "dirichlet:0.3", "dirichlet-size:0.5", "shards:2", "writer"]


def parts_of(name: str, clients: int = 4, seed: int = 0) -> list[torch.Tensor]:
    config = RunConfig(partition=name, clients=clients, seed=seed)
    check_partition(config)
    return partition(SAMPLES, config)


def classes_of(part: torch.Tensor) -> int:
    return len(set(LABELS[part].tolist()))


@pytest.mark.parametrize("name", ALL)
def test_parts_are_disjoint_cover_the_data_and_depend_on_the_seed(name: str) -> None:
    parts = parts_of(name)
    assert len(parts) == 4
    assert sorted(torch.cat(parts).tolist()) == list(range(3000))
    again, other = parts_of(name), parts_of(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_a_small_alpha_leaves_few_classes_and_a_large_one_all() -> None:
    def majority(name: str) -> float:
        """The mean share of each client's largest class."""
        counts = [torch.bincount(LABELS[p], minlength=10) for p in parts_of(name, clients=10)]
        return float(sum(c.max() / c.sum() for c in counts) / len(counts))

    assert majority("dirichlet:0.1") > 0.4
    assert majority("dirichlet:1000") < 0.14
    assert majority("iid") < 0.16


def test_dirichlet_sizes_skew_the_sizes_alone() -> None:
    parts = parts_of("dirichlet-size:0.5", clients=5)
    sizes = sorted(map(len, parts))
    assert sizes[-1] > 3 * sizes[0]
    for part in parts:
        if len(part) > 200:
            assert classes_of(part) == 10


def test_shards_give_each_client_few_classes() -> None:
    parts = parts_of("shards:2", clients=10)
    assert [len(part) for part in parts] == [150 * 2] * 10
    assert max(map(classes_of, parts)) <= 4
    assert sum(map(classes_of, parts)) / 10 <= 3


@pytest.mark.parametrize("name", ["dirichlet:0.05", "dirichlet-size:0.1"])
def test_a_draw_that_leaves_a_client_with_nothing_is_drawn_again(name: str) -> None:
    for seed in range(5):
        assert min(map(len, parts_of(name, clients=4, seed=seed))) >= MIN_SAMPLES


def test_what_cannot_be_dealt_out_is_one_line() -> None:
    with pytest.raises(DataError, match=r"dirichlet:0.01: of 1000 draws, none left each of 40"):
        parts_of("dirichlet:0.01", clients=40)
    with pytest.raises(DataError, match="4000 shards of 3000 samples"):
        parts_of("shards:400", clients=10)


@pytest.mark.parametrize(
    "name",
    ["dirichlet", "dirichlet:x", "dirichlet:0", "dirichlet:-1", "dirichlet-size:nan", "shards:0",
     "shards:", "shards:1.5", "iid:2", "dirichlett:1"],
)  # fmt: skip
def test_partitions_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        check_partition(RunConfig(partition=name))


def test_a_skewed_partition_trains(tmp_path: Path) -> None:
    config = RunConfig(partition="dirichlet:0.3", model="mlp", rounds=1, run="r")
    run_dir = simulate(config, NodeConfig(out=str(tmp_path)))
    assert (run_dir / "models/client_2_000.pt").exists()


@pytest.mark.slow
def test_the_picture_and_its_table(tmp_path: Path) -> None:
    options = ["--partition", "dirichlet:0.2", "--clients", 4, "--out", tmp_path]
    done = run_program("-m", "experiments.partition", *options)
    rows = [line.split(",") for line in (tmp_path / "partition.csv").read_text().splitlines()]
    assert rows[0] == ["client", *map(str, range(10)), "samples"]
    assert sum(int(row[-1]) for row in rows[1:]) == 4000
    assert all(sum(map(int, row[1:-1])) == int(row[-1]) for row in rows[1:])
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert f"client 0: {rows[1][-1]} samples" in done.stdout
    done = run_program("-m", "experiments.partition", "--partition", "own", code=2)
    assert "there is nothing to deal" in done.stderr
