"""Image files: read, brought to one size."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sfl.errors import DataError


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image as (C, H, W) uint8, bilinearly resized if its size is another.

    Raises:
        DataError: it cannot be read to its end.
    """
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise DataError(f"{path} has more than 8 bits a pixel: convert it to 8")
            converted = image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(converted, dtype=np.uint8).reshape(height, width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_images(paths: Sequence[Path], out: np.ndarray, progress: Callable[[int], object]) -> None:
    """Read images into ``out``: (N, C, H, W) uint8, which says their size.

    Raises:
        DataError: as ``read_image``.
    """

    def read(index: int) -> None:
        out[index] = read_image(paths[index], out.shape[1:])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets other threads run
        try:
            for _ in pool.map(read, range(len(paths))):
                progress(1)
        finally:
            pool.shutdown(cancel_futures=True)
