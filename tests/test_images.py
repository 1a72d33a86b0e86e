"""Image files of every kind: transparent, turned, of more than 8 bits."""

import io
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfl.data.images import read_image
from sfl.errors import DataError
from tests.support.private_data import RGBA, encoded, pixels, png, two_pixels

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
