"""Decoding image files: upright, without transparency, all of one size.

Transparent pixels are put on white, images are turned as their EXIF data say, and of a file with
several pages or frames the first is read.
"""

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sfl.errors import DataError

Note = Callable[[str], object]
# Notes on images that are not read exactly as stored.
ON_WHITE = "with transparent pixels: put on white"
TURNED = "turned as EXIF says"
DAMAGED_EXIF = "with damaged EXIF data: not turned"
FIRST_PAGE = "with further pages or frames: only the first is read"

# What Pillow raises for damaged files, besides its own errors.
_DAMAGE = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, MemoryError, RuntimeError, struct.error,
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag; below, the Image.Transpose for each of its values
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_BITS_PER_SAMPLE = 0x0102  # the TIFF tag
_GREY_BITS = {"L;2": 2, "L;4": 4}


def read_image(path: Path, shape: tuple[int, ...], note: Note = lambda _: None) -> np.ndarray:
    """Return an image as (C, H, W) uint8, resized bilinearly if it has another size.

    ``note`` is called with each way in which the result differs from what is stored.

    Raises:
        DataError: the image cannot be read completely, or has more than 8 bits a channel.
    """
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            _check_depth(image, path)
            if getattr(image, "n_frames", 1) > 1:
                note(FIRST_PAGE)
            opaque = _on_white(_upright(image, note), note)
            converted = opaque.convert("L" if channels == 1 else "RGB")
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error or type(error).__name__}") from error
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(converted, dtype=np.uint8).reshape(height, width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _raw_mode(image: Any) -> str:
    """Return Pillow's name for how the pixels are stored, such as ``RGB;16B``; "" if unknown."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _check_depth(image: Any, path: Path) -> None:
    # Pillow clips grey values of 16 bits and drops the lower half of colours.
    deep = image.mode == "F" or image.mode.startswith("I")
    tiff_bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
    if deep or max(tiff_bits) > 8 or re.search(r";(12|16[BLNS]|32)", _raw_mode(image)):
        raise DataError(f"{path} has more than 8 bits a pixel and channel: convert it to 8")


def _upright(image: Any, note: Note) -> Any:
    """Load an image and return it turned as its EXIF data say."""
    from PIL import Image

    bits = _GREY_BITS.get(_raw_mode(image))  # known only before loading
    try:
        told = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        image.load()
        note(DAMAGED_EXIF)
        return image
    image.load()
    key = image.info.get("transparency")
    if bits and type(key) is int and key < 2**bits:  # Pillow scales the pixels, not this
        image.info["transparency"] = key * (255 // (2**bits - 1))
    if told in _TURNS:
        note(TURNED)
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))  # read again: loading a TIFF turns it
    return image.transpose(Image.Transpose[turn]) if turn else image


def _on_white(image: Any, note: Note) -> Any:
    """Return an image with its transparent pixels on white; one without any, unchanged."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema()[0] == 255:
        return image
    note(ON_WHITE)
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)


def read_images(
    paths: Sequence[Path], out: np.ndarray, progress: Callable[[int], object] = lambda _: None
) -> Counter[str]:
    """Read images into ``out``: (N, C, H, W) uint8; return the number of images for each note.

    Raises:
        DataError: as ``read_image``.
    """
    notes: list[str] = []

    def read(index: int) -> None:
        out[index] = read_image(paths[index], out.shape[1:], notes.append)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        try:
            for _ in pool.map(read, range(len(paths))):
                progress(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return Counter(notes)
