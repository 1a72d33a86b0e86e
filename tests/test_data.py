"""Data sets, partitions, batches, and a client's own data."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfl.config import RunConfig
from sfl.conversation.report import DataReport, describe_data
from sfl.data.client_data import (
    ClientData,
    DatasetSpec,
    batch_indices,
    batch_sizes,
    client_data,
    num_batches,
    part_of,
)
from sfl.data.datasets import DATASETS, dataset_spec
from sfl.data.images import read_image
from sfl.data.partition import check_partition
from sfl.data.private_data import load_own
from sfl.data.samples import Samples, join
from sfl.errors import ConfigError, DataError, RunError
from sfl.strategy.recipe import Recipe
from sfl.values import Position
from tests.support.made_data import loaded, write_mnist

DIGITS = DATASETS["mnist-5k"]


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    return loaded("mnist-5k")


def test_the_embedded_digits_are_split_by_class(digits: tuple[Samples, Samples]) -> None:
    train, test = digits
    assert train.x.shape == (4000, 1, 28, 28)
    assert train.x.dtype == torch.uint8
    assert torch.bincount(train.y).tolist() == [400] * 10
    assert torch.bincount(test.y).tolist() == [100] * 10
    # The first digits of the file: sums of their pixels, and the first held-out one.
    assert [int(x.sum()) for x in train.x[:3]] == [31095, 35433, 36507]
    assert not any(torch.equal(test.x[0], x) for x in train.x[:400])


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_torchvisions_data_sets_are_read_from_the_data_folder(
    tmp_path: Path, name: str, folder: str
) -> None:
    write_mnist(tmp_path, folder, (30, 20))
    said: list[str] = []
    train, test = loaded(name, tmp_path, said.append)
    assert (train.x.shape, test.x.shape) == ((30, 1, 28, 28), (20, 1, 28, 28))
    assert train.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert train.x[0, 0, 0, :5].tolist() == [0, 1, 2, 3, 4]
    assert said == []


def test_data_that_are_nowhere_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])  # nobody listens there
    said: list[str] = []
    with pytest.raises(DataError, match=r"MNIST is not in .* and cannot be downloaded \(.*refused"):
        loaded("mnist", tmp_path / "data", said.append)
    assert said == [f"MNIST is not in {tmp_path / 'data'}; downloading it"]
    assert capsys.readouterr().out == ""


def test_a_data_set_that_is_damaged_is_not_downloaded_again(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST", (30, 20))
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"MNIST.raw is damaged: .*; remove it"):
        loaded("mnist", tmp_path)


@pytest.mark.parametrize("partition", ["iid", "sizes:0.2,0.2,0.6", "sizes:0.98,0.01,0.01"])
def test_parts_are_disjoint_and_cover_the_data(partition: str) -> None:
    marked, marked_test = (
        Samples(torch.zeros(1).expand(n, 1, 28, 28), torch.arange(n)) for n in (4000, 1000)
    )
    run = RunConfig(partition=partition, seed=3)
    parts = [part_of(DIGITS, run, k, (marked, marked_test)) for k in range(3)]
    mine = [torch.cat([part.train.y, part.validation.y]) for part in parts]
    assert sorted(torch.cat(mine).tolist()) == list(range(4000))
    assert sorted(torch.cat([part.test.y for part in parts]).tolist()) == list(range(1000))
    assert [len(part.validation) for part in parts] == [len(m) // 5 for m in mine]
    again = part_of(DIGITS, run, 1, (marked, marked_test))
    assert torch.equal(again.train.y, parts[1].train.y)
    other = part_of(DIGITS, RunConfig(partition=partition, seed=4), 1, (marked, marked_test))
    assert not torch.equal(other.train.y, parts[1].train.y)


def test_sizes_are_what_was_asked_for(digits: tuple[Samples, Samples]) -> None:
    run = RunConfig(partition="sizes:0.2,0.2,0.6")
    parts = [part_of(DIGITS, run, k, digits) for k in range(3)]
    assert [len(p.train) + len(p.validation) for p in parts] == [800, 800, 2400]


@pytest.mark.parametrize(
    ("partition", "reason"),
    [
        ("sizes:0.5,0.5", "2 shares for 3 clients"),
        ("sizes:0.5,0.4,0.3", "add up to 1.2"),
        ("sizes:0.5,0.5,0", "above 0"),
        ("sizes:a,b,c", "above 0"),
        ("sizes", "above 0"),
        ("iid:3", "nothing behind a colon"),
        ("writers", "unknown partition .*did you mean writer"),
        ("writer:2", "nothing behind a colon"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(partition: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_partition(RunConfig(partition=partition))


def test_an_empty_part_is_refused_and_a_tiny_one_has_no_validation() -> None:
    few = Samples(torch.zeros(4, 1, 28, 28), torch.arange(4))
    run = RunConfig(clients=5)
    with pytest.raises(DataError, match="client 4 has no training samples"):
        part_of(DIGITS, run, 4, (few, few))
    tiny = client_data(DIGITS, run, 0, few, few)
    assert (len(tiny.train), len(tiny.validation)) == (4, 0)


@given(st.integers(1, 300), st.integers(1, 64))
def test_batches_cover_the_samples_and_none_has_one_unless_alone(n: int, batch: int) -> None:
    sizes = list(batch_sizes(n, batch))
    assert num_batches(n, batch) == len(sizes)
    assert sum(sizes) == n
    assert max(sizes) <= batch + 1
    assert batch == 1 or n == 1 or min(sizes) > 1
    assert len(sizes) <= max(-(-n // batch), 1)


def test_batches_are_drawn_from_seed_round_client_and_epoch() -> None:
    def draw(seed: int = 0, round_index: int = 0, client: int = 0) -> list[int]:
        run = RunConfig(seed=seed, batch_size=32, local_epochs=2)
        batches = list(batch_indices(100, run, round_index=round_index, client=client))
        assert [len(b) for b in batches] == [32, 32, 32, 4] * 2
        return torch.cat(batches).tolist()

    first = draw()
    torch.rand(3)
    assert draw() == first
    assert sorted(first[:100]) == sorted(first[100:]) == list(range(100))
    orders = [first[:100], first[100:], draw(seed=1)[:100], draw(round_index=1)[:100]]
    orders.append(draw(client=1)[:100])
    assert len({tuple(order) for order in orders}) == 5


def test_a_batch_is_normalised(digits: tuple[Samples, Samples]) -> None:
    data = part_of(DIGITS, RunConfig(), 0, digits)
    x, y = data.batch(data.train, torch.tensor([5, 2]))
    assert (x.dtype, x.shape, y.dtype) == (torch.float32, (2, 1, 28, 28), torch.int64)
    assert torch.allclose(x[0] * 0.3081 + 0.1307, data.train.x[5] / 255, atol=1e-6)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("augmented", ["none", "hflip"])
def test_batches_leave_what_is_stored_as_it_is(
    digits: tuple[Samples, Samples], floats: bool, augmented: str
) -> None:
    """Whether a part is drawn from, or one that has all rows of what is stored."""
    own, _ = digits
    if floats:
        own = Samples(own.stored.float() / 255, own.y)
    data = client_data(DIGITS, RunConfig(augment=augmented), 0, own, own)
    before = own.stored.clone()
    firsts = [
        data.batch(data.test, slice(0, 4))[0],
        data.training_batch(torch.arange(4), Position())[0],
    ]
    assert torch.equal(own.stored, before)
    again = [
        data.batch(data.test, slice(0, 4))[0],
        data.training_batch(torch.arange(4), Position())[0],
    ]
    assert all(map(torch.equal, firsts, again))


# ---- a client's own data


def write_images(folder: Path, counts: dict[str, int], size: tuple[int, int] = (28, 28)) -> None:
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", size, (40 * number + k,) * 3).save(folder / name / f"{k}.png")


def own(path: Path, client: int = 0) -> ClientData:
    return load_own(DIGITS, RunConfig(partition="own"), client, path)


def test_class_folders_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 10, "ant": 5, "empty": 0}, size=(40, 30))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    data = own(tmp_path)
    assert data.classes == ("ant", "cat", "empty")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 3, 0)
    labels = torch.cat([data.train.y, data.validation.y])
    assert torch.bincount(labels, minlength=3).tolist() == [5, 10, 0]
    assert data.train.x.shape[1:] == (1, 28, 28)
    assert data.train.x.dtype == torch.uint8


def test_class_folders_may_have_a_test_set(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 5, "b": 5})
    write_images(tmp_path / "test", {"b": 3})
    data = own(tmp_path)
    assert len(data.test) == 3
    assert data.test.y.tolist() == [1, 1, 1]
    write_images(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match=r"classes that .* lacks: c"):
        own(tmp_path)


def test_an_npz_is_read(tmp_path: Path) -> None:
    x, y = (
        np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8),
        np.arange(20) % 3,
    )
    names = np.array(["x", "y", "z"])
    np.savez(tmp_path / "mine.npz", x=x, y=y, x_test=x[:4] / 255.0, y_test=y[:4], classes=names)
    data = own(tmp_path)
    assert data.classes == ("x", "y", "z")
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 4)
    assert torch.equal((data.test.x * 255).round().byte()[:, 0], torch.from_numpy(x[:4]))
    assert len(own(tmp_path / "mine.npz").train) == 16


GOOD = {"x": np.zeros((5, 28, 28), np.uint8), "y": np.arange(5)}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": GOOD["x"]}, "has arrays x; wanted are x and y"),
        ({**GOOD, "y": np.arange(4)}, "one integer for each sample"),
        ({**GOOD, "y": np.arange(5) / 2}, "one integer for each sample"),
        ({**GOOD, "y": np.arange(5) + 6}, "labels 6 to 10, but there are 10 classes"),
        (
            {**GOOD, "x": np.zeros((5, 784), np.uint8)},
            r"shape \[784\]; wanted are \(N, 1, H, W\) or",
        ),
        ({**GOOD, "x": np.zeros((5, 28, 28, 3), np.uint8)}, r"wanted are \(N, 1, H, W\) or"),
        ({**GOOD, "x": np.full((5, 28, 28), 2.0)}, r"floats outside \[0, 1\]"),
        ({**GOOD, "x": np.full((5, 28, 28), np.nan)}, r"floats outside \[0, 1\]"),
        ({**GOOD, "x": np.zeros((5, 28, 28), np.int32)}, "x is int32"),
        ({**GOOD, "x": np.array([{}])}, "cannot read"),
        ({"x": np.zeros((0, 28, 28), np.uint8), "y": np.zeros(0, int)}, "no training samples"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError, match=reason):
        own(tmp_path)


def test_own_data_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no own data at"):
        own(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty: put one folder of images a class"):
        own(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="holds no training samples"):
        own(tmp_path)
    Image.new("L", (28, 28)).save(tmp_path / "a" / "cut.png")
    whole = (tmp_path / "a" / "cut.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cannot read the image .*cut.png"):
        own(tmp_path)
    (tmp_path / "x.npz").write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(DataError, match=r"cannot read .*x.npz"):
        own(tmp_path)
    (tmp_path / "y.npz").touch()
    with pytest.raises(DataError, match=r"has 2 \.npz files"):
        own(tmp_path)


def test_a_users_own_data_set_is_looked_up() -> None:
    assert dataset_spec("tests.test_data:small").classes == ("a", "b")
    with pytest.raises(ConfigError, match=r"must return an sfl.data.DatasetSpec"):
        dataset_spec("tests.test_data:nothing")
    with pytest.raises(ConfigError, match="give --allow-import"):
        dataset_spec("tests.test_data:small", allowed=[])


def small() -> object:
    samples = Samples(torch.zeros(8, 1, 28, 28), torch.arange(8) % 2)
    return DatasetSpec(lambda source: (samples, samples), (1, 28, 28), ("a", "b"), 0.0, 1.0)


def nothing() -> None:
    return None


def test_own_data_come_in_the_size_that_is_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path / "folders", {"a": 6, "b": 6}, size=(50, 40))
    np.savez(tmp_path / "mine.npz", x=np.zeros((5, 30, 30), np.uint8), y=np.arange(5))
    for name, side in (("folders", 28), ("mine.npz", 28), ("folders", 64), ("mine.npz", 64)):
        spec = DIGITS.sized(side)
        data = load_own(spec, RunConfig(partition="own"), 0, tmp_path / name)
        assert data.train.x.shape[1:] == data.input_shape == (1, side, side)


def test_images_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((28, 28), 5000, np.uint16)).save(tmp_path / "a" / "deep.png")
    with pytest.raises(DataError, match=r"deep.png has more than 8 bits a pixel"):
        own(tmp_path)


def test_parts_of_different_types_join_as_floats() -> None:
    bytes_, floats = torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), torch.full((3, 1, 1, 1), 0.5)
    both = join([Samples(bytes_, torch.arange(2)), Samples(floats, torch.arange(3))])
    assert both.x.flatten().tolist() == [1.0, 1.0, 0.5, 0.5, 0.5]


def test_an_images_file_is_resized_bilinearly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    ours = torch.from_numpy(read_image(tmp_path / "x.png", (1, 28, 28)))
    source = torch.from_numpy(pixels)[None, None].float()
    wanted = torch.nn.functional.interpolate(source, (28, 28), mode="bilinear", antialias=True)
    assert (ours - wanted[0]).abs().max() < 2


def test_what_could_not_be_read_again_is_not_recorded() -> None:
    counts = {"train": 1, "validation": 0, "test": 0}
    for classes, shape in ((1200, (1, 4, 4)), (10, (1, 1, 2, 2, 2)), (10, (1, 5000, 5000))):
        report = DataReport(counts, tuple(map(str, range(classes))), shape, "0" * 64)
        with pytest.raises(RunError, match="the clients' data cannot be recorded: "):
            describe_data({0: report}, Recipe.of(RunConfig()))
