"""The bytes of a ``torch.save`` file of one tensor, of which only the tensor's own ever change.

All files of one dtype and shape are the same, but for the tensor's data and for what follows from
them: their checksum, in two places, the file's ``serialization_id``, and its checksum, in two
places. So a file is written by filling these into one that torch has written, and read by comparing
all the rest with it: in microseconds, and with the same bytes.
"""

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from sfl.saved import Buffer

_CRC = struct.Struct("<I")
# Half of the id: the first says what the records' names are, the second what their checksums are.
_ID_DIGITS = 20
_DATA, _ID = "/data/0", "/.data/serialization_id"
_64_BITS = 2**64 - 1


@dataclass(frozen=True)
class Template:
    """A file of one dtype and shape, and where what changes stands in it."""

    head: bytes  # all that stands before the tensor's data
    num_bytes: int  # of the data
    tail: bytes  # all that stands behind them
    data_crcs: tuple[int, ...]  # where in the tail their checksum stands
    id_at: int  # where in the tail the changing half of the id stands
    id_crcs: tuple[int, ...]
    crcs: tuple[int, ...]  # of the records, in their order; the data's is one of them
    data_index: int  # which
    head_crc: int  # what the head adds to the checksum of the file

    @classmethod
    def of(cls, write: Callable[[int], bytes]) -> "Template | None":
        """Return the template of the files that ``write`` gives for data of one byte, repeated.

        None if they are not of the layout that we know.
        """
        try:
            first, second = write(0), write(1)
            template = cls._of_file(first)
            data = second[len(template.head) : len(template.head) + template.num_bytes]
            return template if template.fill(data) == second else None
        except (ValueError, zipfile.BadZipFile):
            return None

    @classmethod
    def _of_file(cls, file: bytes) -> "Template":
        with zipfile.ZipFile(io.BytesIO(file)) as container:
            records = container.infolist()
            names = [record.filename for record in records]
            folder = names[0].partition("/")[0]
            data, identity = (
                records[names.index(folder + name)] for name in (_DATA, _ID)
            )  # ValueError if one is not there
            content = container.read(data)
            crcs = tuple(r.CRC for r in records if r is not identity)
            data_index = names.index(data.filename)
            digits = container.read(identity)
        start = _content_at(file, data)
        head, tail = file[:start], file[start + len(content) :]
        id_start = _content_at(file, identity) - start - len(content)
        if not content or digits[_ID_DIGITS:] != _digits(crcs):
            raise ValueError("another layout")
        zeros = bytes(len(content) + len(tail))
        return cls(
            head, len(content), tail,
            _places(file, data, start, len(content)),
            id_start + _ID_DIGITS,
            _places(file, identity, start, len(content)),
            crcs, data_index,
            zlib.crc32(zeros, zlib.crc32(head)) ^ zlib.crc32(zeros),
        )  # fmt: skip

    def _tail(self, crc: int) -> bytearray:
        """Return what stands behind data of this checksum."""
        tail = bytearray(self.tail)
        crcs = list(self.crcs)
        crcs[self.data_index] = crc
        tail[self.id_at : self.id_at + _ID_DIGITS] = _digits(tuple(crcs))
        identity = tail[self.id_at - _ID_DIGITS : self.id_at + _ID_DIGITS]
        for places, value in ((self.data_crcs, crc), (self.id_crcs, zlib.crc32(identity))):
            for place in places:
                _CRC.pack_into(tail, place, value)
        return tail

    def _file_crc(self, data_crc: int, tail: Buffer) -> int:
        """Return the checksum of a file from those of its parts."""
        shifted, bits = 0, data_crc
        for table in _behind(len(tail)):
            shifted ^= table[bits & 255]
            bits >>= 8
        return self.head_crc ^ shifted ^ zlib.crc32(tail)

    def fill(self, data: Buffer) -> bytes:
        """Return the file of a tensor whose data these are."""
        return self.fill_checked(data)[0]

    def fill_checked(self, data: Buffer) -> tuple[bytes, int]:
        """Return the file of a tensor whose data these are, and the file's CRC-32."""
        crc = zlib.crc32(data)
        tail = self._tail(crc)
        return b"".join((self.head, data, tail)), self._file_crc(crc, tail)

    def data_of(self, file: Buffer, file_crc: int | None = None) -> memoryview | None:
        """Return the data in a file of this layout, whose checksums are right; else None.

        ``file_crc`` is the CRC-32 of the file, if somebody has computed it: then the data's follows
        from it, and is not computed.
        """
        view, start = memoryview(file), len(self.head)
        end = start + self.num_bytes
        if len(view) != end + len(self.tail) or view[:start] != self.head:
            return None
        data, tail = view[start:end], view[end:]
        crc = zlib.crc32(data) if file_crc is None else _CRC.unpack_from(tail, self.data_crcs[0])[0]
        if tail != self._tail(crc) or file_crc not in (None, self._file_crc(crc, tail)):
            return None
        return data


@functools.lru_cache(maxsize=64)
def _behind(num_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Return what becomes of a checksum when so many bytes follow: a table for each of its bytes.

    A CRC is linear: that of A and B is what becomes of A's, XOR that of B.
    """
    zeros = bytes(num_bytes)
    alone = zlib.crc32(zeros)
    return tuple(
        tuple(zlib.crc32(zeros, byte << shift) ^ alone for byte in range(256))
        for shift in (0, 8, 16, 24)
    )


def _content_at(file: bytes, record: zipfile.ZipInfo) -> int:
    """Return where a record's content begins: behind its head, its name and what else is there."""
    name, extra = struct.unpack_from("<HH", file, record.header_offset + 26)
    return int(record.header_offset + 30 + name + extra)


def _places(file: bytes, record: zipfile.ZipInfo, start: int, num_bytes: int) -> tuple[int, ...]:
    """Return where in the tail a record's checksum stands: behind it, and in the directory."""
    behind = _content_at(file, record) + record.file_size + 4  # a signature comes first
    entry = file.index(record.filename.encode(), file.index(b"PK\1\2", start + num_bytes)) - 46 + 16
    places = tuple(at - start - num_bytes for at in (behind, entry))
    if any(_CRC.unpack_from(file, start + num_bytes + at)[0] != record.CRC for at in places):
        raise ValueError("another layout")
    return places


def _digits(crcs: tuple[int, ...]) -> bytes:
    """Return what torch writes of the records' checksums into the id."""
    combined = 0
    for crc in crcs:  # as boost's hash_combine does
        combined ^= crc + 0x9E3779B9 + (combined << 6 & _64_BITS) + (combined >> 2)
        combined &= _64_BITS
    return b"%020d" % combined
