"""A client's own data, as tests write and read them."""

import io
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sfl.config import RunConfig
from sfl.data.client_data import ClientData, DatasetSpec
from sfl.data.datasets import DATASETS
from sfl.data.private_data import load_own

GREY, COLOUR = DATASETS["mnist-5k"], DATASETS["cifar10"]
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


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


def save(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "mine.npz", **arrays)  # type: ignore[arg-type]
    return folder


def two_pixels(mode: str, hidden: object, seen: object) -> Image.Image:
    """Return an image of one pixel that cannot be seen, and one that can."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), hidden)  # type: ignore[arg-type]
    image.putpixel((1, 0), seen)  # type: ignore[arg-type]
    return image


# The pixel that cannot be seen is of dark colour, the other of grey 85.
RGBA = two_pixels("RGBA", (9, 0, 0, 0), (85, 85, 85, 255))
