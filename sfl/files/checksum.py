"""The CRC-32 of files: ISA-L's, which takes a tenth of zlib's time; zlib's where ISA-L is not.

All bytes of a step's tensors pass through it, on both sides. Both give the same figures.
"""

from typing import NamedTuple

try:
    from isal.isal_zlib import crc32
except ImportError:  # there are no wheels for every machine
    from zlib import crc32

__all__ = ["crc32"]


class File(NamedTuple):
    """The bytes of a ``torch.save`` file, and their checksum; "" if nobody has computed it."""

    data: bytes | bytearray | memoryview
    checksum: str = ""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the checksum of ``data`` as the wire and the manifests write it."""
    return checksum_text(crc32(data))


def checksum_text(crc: int) -> str:
    """Return a CRC-32 as the wire and the manifests write it."""
    return f"crc32:{crc:08x}"


def crc_of(text: str) -> int | None:
    """Return the CRC-32 that a checksum says; None if it says none."""
    return int(text[6:], 16) if text else None
