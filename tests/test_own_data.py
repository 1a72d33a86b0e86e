"""A client's own data: nothing silently becomes something else, or is left out."""

import io
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfl.config import RunConfig
from sfl.conversation.join import DataReport, check_agreement
from sfl.data.class_names import listed
from sfl.data.client_data import ClientData, DatasetSpec, client_data
from sfl.data.datasets import DATASETS, dataset_of
from sfl.data.images import read_image
from sfl.data.own_data import load_own
from sfl.data.samples import Samples
from sfl.errors import ConfigError, DataError, RunError
from sfl.nodes import NodeConfig
from sfl.runtime.preflight import check_run
from sfl.runtime.simulation import simulate
from tests.support.launch import Launcher
from tests.support.weights import assert_equal, weights

GREY, COLOUR = DATASETS["mnist-5k"], DATASETS["cifar10"]


class Own:
    """Loads own data, and keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, path: Path, spec: DatasetSpec = GREY, **options: str) -> ClientData:
        run = RunConfig(partition="own", **options)  # type: ignore[arg-type]
        return load_own(spec, run, 0, path, say=self.said.append)

    def line(self, start: str) -> str:
        """Return the only line that starts so."""
        (line,) = (line for line in self.said if line.startswith(start))
        return line


@pytest.fixture
def own() -> Own:
    return Own()


def write_image(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (28, 28), grey).save(path)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def png(bits: int, kind: int, row: bytes, **chunks: bytes) -> bytes:
    """Return a PNG of one row, two pixels wide."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + others + body + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def two_pixels(mode: str, hidden: object, seen: object) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), hidden)  # type: ignore[arg-type]
    image.putpixel((1, 0), seen)  # type: ignore[arg-type]
    return image


# ---- images


# Two pixels: one that cannot be seen, of dark colour, and one of grey 85.
RGBA = two_pixels("RGBA", (9, 0, 0, 0), (85, 85, 85, 255))
TRANSPARENT = {
    "RGBA": encoded(RGBA, "PNG"),
    "LA": encoded(two_pixels("LA", (9, 0), (85, 255)), "PNG"),
    "TIFF": encoded(RGBA, "TIFF", compression="tiff_lzw"),
    "WebP": encoded(RGBA, "WEBP", lossless=True),
    "GIF": encoded(RGBA, "GIF"),
    "P, alphas": png(8, 3, b"\0\1", PLTE=bytes([9, 0, 0, 85, 85, 85]), tRNS=b"\0\xff"),
    "P, index": png(1, 3, b"\x40", PLTE=bytes([9, 0, 0, 85, 85, 85]), tRNS=b"\0"),
    "RGB, key": png(8, 2, bytes([9, 0, 0, 85, 85, 85]), tRNS=bytes([0, 9, 0, 0, 0, 0])),
    "L, key": png(8, 0, bytes([9, 85]), tRNS=bytes([0, 9])),
    "L of 2 bits, key": png(2, 0, bytes([0b00010000]), tRNS=bytes(2)),
    "L of 4 bits, key": png(4, 0, bytes([0x25]), tRNS=bytes([0, 2])),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_put_on_white(tmp_path: Path, kind: str, channels: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(TRANSPARENT[kind])
    notes: list[str] = []
    read = read_image(path, (channels, 1, 2), notes.append)
    assert read.tolist() == [[[255, 85]]] * channels
    assert notes == ["with transparent pixels: put on white"]


def test_keys_of_few_bits_are_those_of_their_pixels(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for bits, first, second in ((1, 0x80, 0x00), (2, 0b11100000, 2), (4, 0xFA, 10)):
        rows = {1: (255, 0), 2: (255, 170), 4: (255, 170)}[bits]
        path.write_bytes(png(bits, 0, bytes([first]), tRNS=bytes([0, second])))
        assert read_image(path, (1, 1, 2)).tolist() == [[[255, 255]]]
        path.write_bytes(png(bits, 0, bytes([first])))
        assert read_image(path, (1, 1, 2)).tolist() == [[list(rows)]]


def test_half_transparent_pixels_are_blended_and_opaque_ones_stay(tmp_path: Path) -> None:
    rgba = pixels(6, 5, 4)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "x.png")
    Image.fromarray(rgba).convert("RGB").save(tmp_path / "y.png")
    notes: list[str] = []
    for shape in ((3, 6, 5), (1, 6, 5)):
        opaque = read_image(tmp_path / "x.png", shape, notes.append)
        assert np.array_equal(opaque, read_image(tmp_path / "y.png", shape))
    assert notes == []
    rgba[..., 3] = 51  # a fifth
    Image.fromarray(rgba).save(tmp_path / "x.png")
    blended = read_image(tmp_path / "x.png", (3, 6, 5)).transpose(1, 2, 0)
    assert np.abs(blended - (rgba[..., :3] / 5 + 255 * 4 / 5)).max() <= 1


UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF, LZW"])
def test_images_are_turned_as_exif_says(tmp_path: Path, kind: str, orientation: int) -> None:
    kind, _, compression = kind.partition(", ")
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    options |= {"compression": "tiff_lzw"} if compression else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels(16, 8)).convert("RGB")
    (tmp_path / "x.png").write_bytes(encoded(image, kind, exif=exif, **options))
    with Image.open(io.BytesIO(encoded(image, kind, **options))) as stored:
        upright = UPRIGHT[orientation](np.asarray(stored.convert("L")))
    notes: list[str] = []
    read = read_image(tmp_path / "x.png", (1, *upright.shape), notes.append)
    assert np.array_equal(read[0], upright)
    assert notes == ["turned as EXIF says"] * (orientation > 1)


def test_damaged_exif_data_are_said(tmp_path: Path) -> None:
    image = Image.new("L", (28, 28), 7)
    (tmp_path / "x.png").write_bytes(encoded(image, "PNG", exif=b"Exif\0\0no EXIF at all"))
    notes: list[str] = []
    assert (read_image(tmp_path / "x.png", (1, 28, 28), notes.append) == 7).all()
    assert notes == ["with damaged EXIF data: not turned"]


def planes_of_16_bits() -> bytes:
    """Return a TIFF of two pixels whose colours lie one after another; Pillow misreads it."""
    head, planes = b"II*\0" + struct.pack("<I", 20), bytes(range(12))
    lists = 22 + 10 * 12 + 4  # behind the directory: bits, offsets, lengths
    directory = struct.pack("<H", 10)
    for tag, kind, count, value in (
        (256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 3, lists), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 3, lists + 6), (277, 3, 1, 3), (278, 4, 1, 1), (279, 4, 3, lists + 18),
        (284, 3, 1, 2),
    ):  # fmt: skip
        directory += struct.pack("<HHII", tag, kind, count, value)
    behind = struct.pack("<3H3I3I", 16, 16, 16, 8, 12, 16, 4, 4, 4)
    return head + planes + directory + bytes(4) + behind


DEEP = {
    "RGB in planes": planes_of_16_bits(),
    "RGB": png(16, 2, bytes(range(12))),
    "RGBA": png(16, 6, bytes(range(16))),
    "LA": png(16, 4, bytes(range(8))),
    "L": png(16, 0, bytes(range(4))),
    "float TIFF": encoded(Image.new("F", (2, 1)), "TIFF"),
    "int TIFF": encoded(Image.new("I", (2, 1)), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_not_clipped(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.png").write_bytes(DEEP[kind])
    with pytest.raises(DataError, match=r"x.png has more than 8 bits a pixel and channel"):
        read_image(tmp_path / "x.png", (3, 1, 2))


# ---- folders


def test_of_each_class_one_line_says_what_was_left_out_and_why(tmp_path: Path, own: Own) -> None:
    for k in range(4):
        write_image(tmp_path / "a" / f"{k}.png", k)
    write_image(tmp_path / "b" / "0.PNG")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"\0\5\x16\7")
    for name in ("x.ppm", "y.jfif", "z.jp2"):
        (tmp_path / "a" / name).touch()
    write_image(tmp_path / "a" / "more" / "5.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    pages = [Image.new("L", (28, 28), grey) for grey in (50, 60, 70)]
    for name in ("pages.tif", "moving.gif", "moving.webp", "moving.png"):
        path = tmp_path / "b" / name
        pages[0].save(path, save_all=True, append_images=pages[1:])
    RGBA.save(tmp_path / "b" / "clear.png")
    data = own(tmp_path)
    assert (len(data.train), len(data.validation)) == (8, 2)
    line = own.line("a/: ")
    assert line.startswith("a/: 4 images read; left out: ")
    for text in (
        "4 hidden or of the system (.DS_Store, ._0.png, Thumbs.db, ...)",
        "1 no file, or a link that leads nowhere (gone.png)",
        "1 in a folder of its own: only what lies in the class's folder itself is read (more)",
        "1 no image by its suffix (notes.txt)",
        "3 of a format that is not read: convert to .png (x.ppm, y.jfif, z.jp2)",
    ):
        assert text in line
    assert own.line("b/: ") == (
        "b/: 6 images read; 4 with further pages or frames: only the first is read;"
        " 1 with transparent pixels: put on white"
    )


def test_what_systems_make_is_no_class(tmp_path: Path, own: Own) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / name / "0.png")
    for name in ("__MACOSX", "@eaDir", ".git", "$RECYCLE.BIN"):
        write_image(tmp_path / name / "0.png")
    write_image(tmp_path / "beside.png")
    assert own(tmp_path).classes == ("a", "b")
    line = own.line(f"{tmp_path}: left out")
    assert "4 hidden or of the system ($RECYCLE.BIN, .git, @eaDir, ...)" in line
    assert "1 beside the folders of the classes (beside.png)" in line


@pytest.mark.parametrize("has_test", [False, True])
def test_val_is_the_validation_part(tmp_path: Path, own: Own, has_test: bool) -> None:
    for k in range(10):
        write_image(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", k)
    write_image(tmp_path / "val" / "b" / "0.png", 77)
    if has_test:
        write_image(tmp_path / "test" / "a" / "0.png", 99)
    (tmp_path / "notes").mkdir()
    write_image(tmp_path / "train" / "astray.png")
    data = own(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 1, int(has_test))
    assert sorted(data.train.x[:, 0, 0, 0].tolist()) == list(range(10))
    assert (data.validation.x[0, 0, 0, 0], data.validation.y.tolist()) == (77, [1])
    assert own.line("train/a/") == "train/a/: 5 images read"
    assert own.line("val/a/") == "val/a/: 0 images read"
    assert own.line("val/b/") == "val/b/: 1 image read"
    assert own.line(f"{tmp_path}: left out") == f"{tmp_path}: left out: 1 beside train/ (notes)"
    write_image(tmp_path / "val" / "c" / "0.png")
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: c"):
        own(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["0.png", "1.png"], r"has 2 images, but no folder says of which class"),
        (["train/0.png"], r"train has 1 image, but no folder says of which class"),
        (["train/a/0.png", "val/0.png"], r"val has 1 image, but no folder says"),
        (["train/a/0.png", "test/0.png"], r"test has 1 image, but no folder says"),
        (["Train/a/0.png", "Val/a/0.png"], r"Train looks like a part of the data, but is none"),
        (["Train/a/0.png", "b/0.png"], r"Train looks like a part of the data"),
        (["train/a/0.png", "Test/a/0.png"], r"Test looks like a part of the data"),
        (["train/a/0.png", "valid/a/0.png"], r"valid looks like a part of the data"),
        (["train/a/0.png", "validation/0.png"], r"validation looks like a part of the data"),
        (["test/a/0.png"], r"test looks like a part of the data"),
        (["train/0.png", "val/0.png", "notes/x.txt"], r"train has 1 image, but no folder says"),
        (["mine/train/a/0.png"], r"holds no training samples"),
        (["train/a/x.txt", "test/a/0.png"], r"holds no training samples"),
    ],
)
def test_another_layout_is_shown_the_one_that_is_wanted(
    tmp_path: Path, own: Own, files: list[str], reason: str
) -> None:
    for name in files:
        write_image(tmp_path / name) if name.endswith("png") else None
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    wanted = r".*DIR/<class>/<image>.png, or DIR/train/<class>/.* DIR/val/<class>/"
    with pytest.raises(DataError, match=reason + wanted):
        own(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path, own: Own) -> None:
    for name in ("bus", "train", "Test"):
        write_image(tmp_path / name / "0.png")
    assert own(tmp_path).classes == ("Test", "bus", "train")


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_classes_that_look_alike_are_shown_with_their_code_points(tmp_path: Path, own: Own) -> None:
    reports = {
        k: DataReport({"train": 1, "validation": 0, "test": 0}, ("a", name), (1, 28, 28), "0" * 64)
        for k, name in enumerate((NFC, NFD))
    }
    shown = (
        f"client_0 has 2 (a, {NFC} [U+00E9]), client_1 2 (a, {NFD} [U+0065 U+0301]); all need the"
        " same ones, a folder may be empty"
    )
    with pytest.raises(RunError) as caught:
        check_agreement(reports)
    assert str(caught.value) == f"classes differ: {shown}"
    for name in (NFC, NFD):
        write_image(tmp_path / "train" / name / "0.png")
    assert own(tmp_path).classes == (NFD, NFC)
    assert f"{NFD} [U+0065 U+0301], {NFC} [U+00E9]" in own.line(f"{tmp_path / 'train'}: classes")


@pytest.mark.parametrize(
    ("name", "other", "shown"),
    [
        ("cat", "Cat", "cat [U+0063 U+0061 U+0074]"),
        ("cat ", "cat", "cat  [U+0020]"),
        ("c\u200bat", "cat", "c\u200bat [U+200B]"),
        ("\u0441at", "cat", "\u0441at [U+0441]"),
        ("cat", "dog", "cat"),
        (NFC, NFC, NFC),
    ],
)
def test_only_names_that_look_alike_have_code_points(name: str, other: str, shown: str) -> None:
    assert listed(["a", name], ["a", other]) == f"2 (a, {shown})"


def test_of_many_classes_those_that_differ_are_shown() -> None:
    names = [f"{k:02}" for k in range(50)]
    assert listed(names, names[:40] + names[41:]).startswith("50 (40, 00, 01,")


# ---- arrays


def save(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "mine.npz", **arrays)  # type: ignore[arg-type]
    return folder


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
        dataset_of(RunConfig(dataset="tests.test_own_data:table", image_size=8))


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


# ---- over sockets


def test_a_client_says_what_it_read_and_the_run_equals_the_simulation(
    launcher: Launcher, tmp_path: Path
) -> None:
    """One client has folders with a validation part, the other floats of another range."""
    folder = tmp_path / "client_0"
    for k in range(20):
        write_image(folder / "train" / "ab"[k % 2] / f"{k}.png", 12 * k)
    write_image(folder / "val" / "a" / "0.png")
    write_image(folder / "train" / "a" / "._0.png")
    (tmp_path / "client_1").mkdir()
    x = np.random.default_rng(0).normal(2, 3, (20, 28, 28))
    save(tmp_path / "client_1", x=x, y=np.array(["a", "b"] * 10), x_val=x[:3], y_val=["a"] * 3)
    text = "mean=0.5,std=0.25"
    options = ["--partition", "own", "--model", "mlp", "--rounds", 1, "--normalize", text]
    server = launcher.server("--clients", 2, "--run", "r", *options)
    clients = [
        launcher.client("--client-id", k, "--data-dir", tmp_path / f"client_{k}") for k in range(2)
    ]
    for program in launcher.programs:
        program.ended_with(0)
    assert "client_0 is ready: 20 train, 1 validation, 0 test samples" in server.out
    line = "train/a/: 10 images read; left out: 1 hidden or of the system (._0.png)"
    log = (tmp_path / "client" / "r" / "client_0" / "client_log.txt").read_text()
    assert line in clients[0].out
    assert line in log
    assert "3 samples for validation" in clients[1].out
    assert f"normalised by {text}: samples have mean" in clients[1].out
    run = RunConfig(
        partition="own", model="mlp", rounds=1, clients=2, run="s", normalize=text
    )  # fmt: skip
    one_process = simulate(run, NodeConfig(out=str(tmp_path), data_dir=str(tmp_path)))
    assert_equal(weights(tmp_path / "server" / "r"), weights(one_process))
