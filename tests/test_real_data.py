"""Real data sets, of those that lie in ``$SFL_DATA_DIR``: what they are, and that they train.

Collected only if that is set (``conftest.py``): nothing of them is part of the project.
"""

import csv
import json
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.data.client_data import part_of
from sfl.data.datasets import DATASETS
from sfl.data.ham10000 import read_metadata
from sfl.data.samples import Samples
from tests.conftest import REAL_DATA
from tests.support.launch import Launcher
from tests.support.made_data import loaded

assert REAL_DATA is not None

FOLDERS = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "cifar-10-batches-py",
    "femnist": "FEMNIST",
    "ham10000": "HAM10000",
}
HERE = [name for name, folder in FOLDERS.items() if (REAL_DATA / folder).is_dir()]
assert HERE, f"SFL_DATA_DIR={REAL_DATA} has none of {', '.join(FOLDERS.values())}"

MNIST = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
# samples of training and test set, of each class if that is known, sums of the first images' pixels
FACTS: dict[str, tuple[int, int, list[int] | None, int, int]] = {
    "mnist": (60000, 10000, MNIST, 27525, 18454),
    "fashion-mnist": (60000, 10000, [6000] * 10, 76247, 33456),
    "cifar10": (50000, 10000, [5000] * 10, 317790, 332962),
    "femnist": (14708, 1685, None, 196329, 196329),
    "ham10000": (8020, 1995, [268, 406, 888, 95, 891, 5358, 114], 2230393, 2265672),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def load_real(name: str, cache: Path) -> tuple[Samples, Samples]:
    assert REAL_DATA is not None
    return loaded(name, REAL_DATA, cache=cache)


@pytest.mark.parametrize("name", HERE)
def test_sizes_classes_and_first_images(name: str, cache: Path) -> None:
    num_train, num_test, per_class, first_train, first_test = FACTS[name]
    train, test = load_real(name, cache)
    spec = DATASETS[name]
    assert (len(train), len(test)) == (num_train, num_test)
    counts = torch.bincount(train.y, minlength=len(spec.classes)).tolist()
    assert len(counts) == len(spec.classes)
    assert per_class is None or counts == per_class
    assert min(counts) > 0
    first = (train.x[0], test.x[0])
    assert [int(x.sum()) for x in first] == [first_train, first_test]
    assert first[0].shape == spec.input_shape
    pixels = train.x.transpose(0, 1).flatten(1).float() / 255
    for figures, wanted in ((pixels.mean(1), spec.mean), (pixels.std(1), spec.std)):
        assert torch.allclose(figures, torch.tensor(wanted).reshape(-1), atol=1e-3)


@pytest.mark.parametrize("name", HERE)
def test_two_rounds_over_sockets(name: str, cache: Path, launcher: Launcher) -> None:
    assert REAL_DATA is not None
    launcher.env["SFL_CACHE_DIR"] = str(cache)
    options = ["--dataset", name, "--rounds", 2, "--batch-size", 256, "--keep-tensors", "none"]
    options += ["--partition", "writer"] if name == "femnist" else []
    run = launcher.run(*options, client_options=["--data-dir", REAL_DATA])
    rows = list(csv.DictReader((run / "rounds.csv").read_text().splitlines()))
    assert len(rows) == 2
    data = json.loads((run / "environment.json").read_text())["data"]["num_samples"].values()
    assert sum(part["train"] + part["validation"] for part in data) == FACTS[name][0]
    assert sum(part["test"] for part in data) == FACTS[name][1]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


if "femnist" in HERE:

    def test_no_writer_of_femnist_is_in_two_clients(cache: Path) -> None:
        both = load_real("femnist", cache)
        for clients in (3, 105):
            run = RunConfig(dataset="femnist", partition="writer", clients=clients)
            parts = [part_of(DATASETS["femnist"], run, k, both) for k in range(clients)]
            groups = [
                {int(w) for s in (p.train, p.validation, p.test) for w in s.writers}  # type: ignore[union-attr]
                for p in parts
            ]
            assert sum(map(len, groups)) == len(set().union(*groups)) == 105
        assert min(len(p.train) + len(p.validation) for p in parts) == 4


if "ham10000" in HERE:

    def test_no_lesion_of_ham10000_is_in_both_parts(cache: Path) -> None:
        assert REAL_DATA is not None
        rows = read_metadata(REAL_DATA / "HAM10000")
        both = load_real("ham10000", cache)
        lesions = [{rows[int(k)]["lesion_id"] for k in part.rows} for part in both]  # type: ignore[union-attr]
        assert not lesions[0] & lesions[1]
        assert len(lesions[0] | lesions[1]) == 7470
        assert sum(map(len, both)) == 10015
