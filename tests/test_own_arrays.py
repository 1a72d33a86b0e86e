"""A client's private arrays: npz files, names of classes, normalisation."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from sfl.config import RunConfig
from sfl.data.client_data import DatasetSpec, client_data
from sfl.data.datasets import dataset_of
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError
from sfl.runtime.preflight import check_run
from tests.support.private_data import COLOUR, GREY, NFC, NFD, Own, pixels, save, write_image

LABELS = np.arange(10) % 2


@pytest.mark.parametrize(("spec", "channels"), [(GREY, 1), (COLOUR, 3)])
@pytest.mark.parametrize("side", [28, 32, 40])
def test_channels_may_come_last(
    tmp_path: Path, own: Own, spec: DatasetSpec, channels: int, side: int
) -> None:
    x = pixels(10, side, side, channels)
    first, last = (
        own(save(tmp_path, x=images, y=LABELS), spec) for images in (x.transpose(0, 3, 1, 2), x)
    )
    assert torch.equal(first.train.x, last.train.x)
    assert torch.equal(first.validation.x, last.validation.x)
    assert f"read as (N, H, W, {channels})" in own.said[-1]
    assert ("resized" in own.said[-1]) == (side != spec.input_shape[1])


def test_labels_and_classes_may_be_names(tmp_path: Path, own: Own) -> None:
    x, names = pixels(4, 28, 28), ["café", "ant", "bee", "ant"]
    as_bytes = np.array([name.encode() for name in names])
    for y in (np.array(names), as_bytes):
        data = own(save(tmp_path, x=x, y=y, x_val=x[:2], y_val=y[1:3]))
        assert data.classes == ("ant", "bee", "café")
        assert sorted(data.train.y.tolist()) == [0, 0, 1, 2]
        assert data.validation.y.tolist() == [0, 1]
        data = own(save(tmp_path, x=x, y=y, classes=np.array(["bee", "café", "fly", "ant"])))
        assert data.classes == ("bee", "café", "fly", "ant")
        assert sorted(data.train.y.tolist()) == [0, 1, 3, 3]
    data = own(save(tmp_path, x=x, y=np.arange(4) % 3, classes=as_bytes[:3]))
    assert data.classes == ("café", "ant", "bee")


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x_test": pixels(3, 28, 28)}, r"has arrays .*x_test.* wanted are .* each x with its y"),
        ({"y_test": LABELS}, r"has arrays .*y_test.* each x with its y"),
        ({"x_val": pixels(3, 28, 28)}, r"has arrays .*x_val.* each x with its y"),
        ({"x_test": pixels(3, 28, 28), "y_test": LABELS}, r"one integer for each sample of x_test"),
        ({"y": LABELS[:9]}, r"int64 of shape \[9\], x has \[10\] samples"),
        ({"y": np.array(["a"] * 9)}, r"of shape \[9\], x has \[10\] samples"),
        ({"y": LABELS[:, None]}, r"one integer for each sample of x"),
        ({"y": np.eye(10)}, r"one integer for each sample of x"),
        ({"y": np.array([b"\xff"] * 10)}, r"y has names that are no text in UTF-8"),
        ({"classes": np.array([b"\xff", b"a"])}, r"classes has names that are no text"),
        ({"classes": np.array(["a", "a"])}, r"classes names a more than once"),
        ({"y": np.array([NFC] * 10), "classes": np.array([NFD])}, r"U\+00E9.*U\+0065 U\+0301"),
        (
            {"y": np.array(["a"] * 10), "x_test": pixels(1, 28, 28), "y_test": np.array(["b"])},
            r"y_test has 1 \(b\), which are none of the classes 1 \(a\)",
        ),
        ({"x": pixels(10, 1, 28, 1)}, r"which may be \(N, 1, H, W\) or \(N, H, W, 1\)"),
        ({"x": pixels(10)}, r"samples of shape \[\]; wanted are"),
        ({"x": pixels()}, r"samples of shape \[\]; wanted are"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, own: Own, arrays: Mapping[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        own(save(tmp_path, **({"x": pixels(10, 28, 28), "y": LABELS} | dict(arrays))))


@pytest.mark.parametrize(
    "shape", [(20,), (1, 20), (20, 1), (1, 1, 20), (1, 20, 1), (2, 10), (1, 3, 9), (784,)]
)
@pytest.mark.parametrize("spec", [GREY, GREY.sized(64), COLOUR])
def test_rows_of_numbers_are_no_images(
    tmp_path: Path, own: Own, shape: tuple[int, ...], spec: DatasetSpec
) -> None:
    reason = r"are no images that could be resized|wanted are \(N|which may be \(N"
    with pytest.raises(DataError, match=reason):
        own(save(tmp_path, x=pixels(10, *shape), y=LABELS), spec)


def table() -> DatasetSpec:
    """Return a data set of 20 numbers a sample, with statistics of their own."""
    return DatasetSpec(lambda source: ..., (20,), ("a", "b"), mean=1000.0, std=500.0)  # type: ignore[arg-type, return-value]


def test_a_table_is_read_for_a_data_set_of_tables_alone(tmp_path: Path, own: Own) -> None:
    x = np.random.default_rng(0).normal(1000, 500, (10, 20))
    data = own(save(tmp_path, x=x, y=LABELS), table())
    batch, _ = data.batch(data.train, slice(0, 8))
    wanted = (data.train.x - 1000) / 500
    assert batch.shape == (8, 20)
    assert torch.allclose(batch, wanted)
    for wrong in (x[:, :19], x[:, None], x[:, :, None], x.reshape(10, 4, 5)):
        with pytest.raises(DataError, match=r"wanted are \(N, 20\)"):
            own(save(tmp_path, x=wrong, y=LABELS), table())
    write_image(tmp_path / "images" / "a" / "0.png")
    with pytest.raises(DataError, match=r"\[20\], are no grey or coloured images"):
        own(tmp_path / "images", table())
    with pytest.raises(ConfigError, match=r"--image-size 8: .*\[20\], are no images"):
        dataset_of(RunConfig(dataset="tests.test_own_arrays:table", image_size=8))


def test_floats_of_any_range_need_statistics_of_their_own(tmp_path: Path, own: Own) -> None:
    x = np.random.default_rng(0).normal(-300, 900, (10, 32, 32, 3))
    save(tmp_path, x=x, y=LABELS)
    with pytest.raises(DataError, match=r"outside \[0, 1\].* --normalize mean=M,std=S"):
        own(tmp_path, COLOUR)
    data = own(tmp_path, COLOUR, normalize="mean=-300/-200/-100,std=900/800/700")
    batch, _ = data.batch(data.train, slice(0, 8))
    mean, std = (
        torch.tensor(t).reshape(3, 1, 1) for t in ((-300.0, -200, -100), (900.0, 800, 700))
    )
    assert torch.equal(batch, (data.train.x - mean) / std)
    own(tmp_path, COLOUR, dataset="their.own:function")  # whose statistics are for these floats
    x[0, 0, 0, 0] = 1e300  # infinite as float32
    with pytest.raises(DataError, match=r"x holds NaN or infinity"):
        own(save(tmp_path, x=x, y=LABELS), COLOUR, normalize="mean=0,std=1")


def test_bytes_are_divided_by_255_before_they_are_normalised(tmp_path: Path) -> None:
    part = Samples(torch.full((2, 1, 28, 28), 51, dtype=torch.uint8), torch.arange(2))
    data = client_data(GREY, RunConfig(normalize="mean=0.1,std=0.5"), 0, part, part)
    batch, _ = data.batch(data.train, slice(0, 2))
    assert torch.allclose(batch, torch.tensor(0.2))


@pytest.mark.parametrize("dataset", ["cifar10", "their.own:function"])
@pytest.mark.parametrize(
    "text",
    ["none", "0.5,0.5", "mean=0.5", "std=1,mean=0", "mean=0,std=0", "mean=nan,std=1",
     "mean=0,std=inf", "mean=1/2,std=1", "mean=1e30,std=1"],
)  # fmt: skip
def test_a_normalisation_that_is_none_is_refused_before_the_start(text: str, dataset: str) -> None:
    with pytest.raises(ConfigError, match=rf"--normalize '{text}': give mean=M,std=S"):
        check_run(RunConfig(normalize=text, dataset=dataset, cut=1))


def test_a_normalisation_of_other_channels_is_refused_before_the_start() -> None:
    with pytest.raises(ConfigError, match="2 means, but samples of mnist-5k have 1 channels"):
        check_run(RunConfig(normalize="mean=1/2,std=1/2"))


def _raw(folder: Path, write: Callable[[Path], object]) -> Path:
    write(folder / "mine.npz")
    return folder


def test_what_is_no_npz_is_refused_in_one_line(tmp_path: Path, own: Own) -> None:
    def entry_without_npy(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", b"bytes")
            archive.writestr("y", b"bytes")

    def plain_npy(path: Path) -> None:
        with open(path, "wb") as stream:
            np.save(stream, pixels(10, 28, 28))

    def objects(path: Path) -> None:
        np.savez(path, x=pixels(2, 28, 28), y=np.array([{}, {}]))

    for write in (entry_without_npy, plain_npy, objects, lambda path: path.touch()):
        with pytest.raises(DataError, match=r"mine.npz"):
            own(_raw(tmp_path, write))


def test_what_lies_beside_arrays_and_an_npz_is_said(tmp_path: Path, own: Own) -> None:
    save(tmp_path, x=pixels(10, 28, 28), y=LABELS, x_train=pixels(3), weights=pixels(4))
    (tmp_path / "._mine.npz").write_bytes(b"\0\5\x16\7")
    write_image(tmp_path / "a" / "0.png")
    assert len(own(tmp_path).train) == 8
    assert own.line(f"{tmp_path}: ") == (
        f"{tmp_path}: left out: 2 beside the .npz file (._mine.npz, a)"
    )
    assert "left out: arrays x_train, weights" in own.said[1]
    assert "10 samples for train of [28, 28], read as (N, H, W)" in own.said[2]
    assert "classes: 5 0, 5 1, 0 2" in own.said[2]
