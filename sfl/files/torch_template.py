"""The bytes of a ``torch.save`` file of one tensor, of which only the tensor's own ever change.

All files of one dtype and shape are the same, but for the tensor's data and for what follows from
them: their checksum, in two places, the file's ``serialization_id``, and its checksum, in two
places. So a file is written by filling these into one that torch has written, and read by comparing
all the rest with it: in microseconds, and with the same bytes.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sfl.files.checksum import crc32
from sfl.files.torch_reader import Buffer

_CRC = struct.Struct("<I")
# Half of the id: the first says what the records' names are, the second what their checksums are.
_ID_DIGITS = 20
_DATA, _ID = "/data/0", "/.data/serialization_id"
_64_BITS = 2**64 - 1


@dataclass(frozen=True)
class Template:
    """A file of one dtype and shape, but for what changes."""

    head: bytes  # all that stands before the tensor's data
    num_bytes: int  # of the data
    num_file_bytes: int
    # What stands behind the data, but for: the data's checksum, the changing half of the id, the
    # id's checksum, and both checksums again.
    texts: tuple[bytes, ...]
    id_crc: int  # the checksum of the id's other half, which comes first
    combined: int  # what the id has of the records before the data
    crcs: tuple[int, ...]  # of the records behind them
    head_crc: int  # what the head adds to the checksum of itself and the data

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
            num_bytes = len(container.read(data))
            digits = container.read(identity)
        crcs = [r.CRC for r in records if r is not identity]
        place = names.index(data.filename)
        start = _content_at(file, data)
        end, id_start = start + num_bytes, _content_at(file, identity)
        if not num_bytes or digits[_ID_DIGITS:] != _digits(_combine(0, crcs)):
            raise ValueError("another layout")
        data_crcs, id_crcs = (_places(file, record, end) for record in (data, identity))
        changes = (
            (data_crcs[0], _CRC.size), (id_start + _ID_DIGITS, _ID_DIGITS),
            (id_crcs[0], _CRC.size), (data_crcs[1], _CRC.size),
            (id_crcs[1], _CRC.size),
        )  # fmt: skip
        texts = []
        for at, length in changes:
            if at < end:
                raise ValueError("another layout")
            texts.append(file[end:at])
            end = at + length
        zeros = bytes(num_bytes)
        return cls(
            file[:start], num_bytes, len(file), (*texts, file[end:]),
            crc32(digits[:_ID_DIGITS]),
            _combine(0, crcs[:place]), tuple(crcs[place + 1 :]),
            crc32(zeros, crc32(file[:start])) ^ crc32(zeros),
        )  # fmt: skip

    def _tail(self, crc: int) -> bytes:
        """Return what stands behind data of this checksum."""
        a, b, c, d, e, f = self.texts
        digits = _digits(_combine(self.combined, (crc, *self.crcs)))
        of_data, of_id = _CRC.pack(crc), _CRC.pack(crc32(digits, self.id_crc))
        return b"".join((a, of_data, b, digits, c, of_id, d, of_data, e, of_id, f))

    def _file_crc(self, data_crc: int, tail: bytes) -> int:
        """Return the checksum of a file: a CRC is linear, so the data need not be read again."""
        return crc32(tail, self.head_crc ^ data_crc)

    def fill(self, data: Buffer) -> bytes:
        """Return the file of a tensor whose data these are."""
        return self.fill_checked(data)[0]

    def fill_checked(self, data: Buffer) -> tuple[bytes, int]:
        """Return the file of a tensor whose data these are, and the file's CRC-32."""
        crc = crc32(data)
        tail = self._tail(crc)
        return b"".join((self.head, data, tail)), self._file_crc(crc, tail)

    def data_of(self, file: Buffer, file_crc: int | None = None) -> memoryview | None:
        """Return the data in a file of this layout, whose checksums are right; else None.

        ``file_crc`` is the CRC-32 of the file, if somebody has computed it: then the data's follows
        from it, and is not computed.
        """
        view, start = memoryview(file), len(self.head)
        end = start + self.num_bytes
        if len(view) != self.num_file_bytes or bytes(view[:start]) != self.head:
            return None
        data, tail, crc_at = view[start:end], bytes(view[end:]), len(self.texts[0])
        if file_crc is None:
            crc = crc32(data)
        else:
            crc = int.from_bytes(tail[crc_at : crc_at + _CRC.size], "little")
        if tail != self._tail(crc) or file_crc not in (None, self._file_crc(crc, tail)):
            return None
        return data


def _content_at(file: bytes, record: zipfile.ZipInfo) -> int:
    """Return where a record's content begins: behind its head, its name and what else is there."""
    name, extra = struct.unpack_from("<HH", file, record.header_offset + 26)
    return int(record.header_offset + 30 + name + extra)


def _places(file: bytes, record: zipfile.ZipInfo, data_end: int) -> tuple[int, int]:
    """Return where a record's checksum stands: behind it, and in the directory."""
    behind = _content_at(file, record) + record.file_size + 4  # a signature comes first
    entry = file.index(record.filename.encode(), file.index(b"PK\1\2", data_end)) - 46 + 16
    if any(_CRC.unpack_from(file, at)[0] != record.CRC for at in (behind, entry)):
        raise ValueError("another layout")
    return behind, entry


def _combine(combined: int, crcs: Iterable[int]) -> int:
    """Return what torch makes of the records' checksums, from what it made of those before."""
    for crc in crcs:  # as boost's hash_combine does
        combined ^= crc + 0x9E3779B9 + (combined << 6 & _64_BITS) + (combined >> 2)
        combined &= _64_BITS
    return combined


def _digits(combined: int) -> bytes:
    """Return what of it stands in the id."""
    return b"%020d" % combined
