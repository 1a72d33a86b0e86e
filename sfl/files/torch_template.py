"""Fast ``torch.save`` files of one tensor, by filling in a template.

Files of one dtype and shape differ only in the tensor's data and in what is computed from it: the
data's CRC (twice), the file's ``serialization_id``, and the id's CRC (twice). So a file is written
by filling these into a file that torch wrote, and read by comparing everything else with it. This
takes microseconds and gives the same bytes as ``torch.save``.
"""

import io
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sfl.files.checksum import crc32
from sfl.files.torch_reader import Buffer

_CRC = struct.Struct("<I")
# Half of the id: its first digits hash the records' names, the second ones their CRCs.
ID_DIGITS = 20
_DATA, _ID = "/data/0", "/.data/serialization_id"
_64_BITS = 2**64 - 1


@dataclass(frozen=True)
class Template:
    """The constant bytes of all files of one dtype and shape."""

    head: bytes  # everything before the tensor's data
    num_bytes: int  # size of the data
    num_file_bytes: int
    # The pieces between and around: the data's CRC, the variable half of the id, the id's CRC, and
    # both CRCs again, in the directory.
    texts: tuple[bytes, ...]
    id_crc: int  # CRC of the constant first half of the id
    combined: int  # hash of the CRCs of the records before the data
    crcs: tuple[int, ...]  # of the records after the data
    head_crc: int  # the head's contribution to the CRC of head and data

    @classmethod
    def of(cls, write: Callable[[int], bytes]) -> "Template | None":
        """Return the template of ``write``'s files; None if their layout is not the known one.

        ``write(byte)`` returns the file of a tensor whose data repeat this byte.
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
            )  # ValueError if one is missing
            num_bytes = len(container.read(data))
            digits = container.read(identity)
        crcs = [r.CRC for r in records if r is not identity]
        place = names.index(data.filename)
        start = content_at(file, data)
        end, id_start = start + num_bytes, content_at(file, identity)
        if not num_bytes or digits[ID_DIGITS:] != id_digits(crcs):
            raise ValueError("another layout")
        data_crcs, id_crcs = (crc_places(file, record, end) for record in (data, identity))
        changes = (
            (data_crcs[0], _CRC.size), (id_start + ID_DIGITS, ID_DIGITS),
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
            crc32(digits[:ID_DIGITS]),
            _combine(0, crcs[:place]), tuple(crcs[place + 1 :]),
            crc32(zeros, crc32(file[:start])) ^ crc32(zeros),
        )  # fmt: skip

    def _tail(self, crc: int) -> bytes:
        """Return everything after data of this CRC."""
        a, b, c, d, e, f = self.texts
        digits = _digits(_combine(self.combined, (crc, *self.crcs)))
        of_data, of_id = _CRC.pack(crc), _CRC.pack(crc32(digits, self.id_crc))
        return b"".join((a, of_data, b, digits, c, of_id, d, of_data, e, of_id, f))

    def _file_crc(self, data_crc: int, tail: bytes) -> int:
        """Return the CRC of a file; a CRC is linear, so the data are not read again."""
        return crc32(tail, self.head_crc ^ data_crc)

    def fill(self, data: Buffer) -> bytes:
        """Return the file of a tensor with these data."""
        return self.fill_checked(data)[0]

    def fill_checked(self, data: Buffer) -> tuple[bytes, int]:
        """Return the file of a tensor with these data, and the file's CRC-32."""
        crc = crc32(data)
        tail = self._tail(crc)
        return b"".join((self.head, data, tail)), self._file_crc(crc, tail)

    def data_of(self, file: Buffer, file_crc: int | None = None) -> memoryview | None:
        """Return the data in a file that fits this template, with correct CRCs; else None.

        ``file_crc`` is the file's CRC-32, if known: it saves computing the CRC of the data.
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


def content_at(file: bytes, record: zipfile.ZipInfo) -> int:
    """Return the offset of a record's content: after its header, name and extra fields."""
    name, extra = struct.unpack_from("<HH", file, record.header_offset + 26)
    return int(record.header_offset + 30 + name + extra)


def crc_places(file: bytes, record: zipfile.ZipInfo, data_end: int) -> tuple[int, int]:
    """Return the offsets of a record's CRC: after its content, and in the directory.

    ``data_end``: where the last tensor's data end, or anywhere after it up to the directory.

    Raises:
        ValueError: the CRC is not there.
    """
    after = content_at(file, record) + record.file_size + 4  # skip the signature
    entry = file.index(record.filename.encode(), file.index(b"PK\1\2", data_end)) - 46 + 16
    if any(_CRC.unpack_from(file, at)[0] != record.CRC for at in (after, entry)):
        raise ValueError("another layout")
    return after, entry


def id_digits(crcs: Iterable[int]) -> bytes:
    """Return the half of a file's id that is computed from the CRCs of its other records."""
    return _digits(_combine(0, crcs))


def _combine(combined: int, crcs: Iterable[int]) -> int:
    """Return torch's hash of the records' CRCs, continued from ``combined``."""
    for crc in crcs:  # boost's hash_combine
        combined ^= crc + 0x9E3779B9 + (combined << 6 & _64_BITS) + (combined >> 2)
        combined &= _64_BITS
    return combined


def _digits(combined: int) -> bytes:
    """Return a hash in the format of the id."""
    return b"%020d" % combined
