"""The zip container of a ``torch.save`` file: refuse every byte that torch does not write.

Zip readers skip bytes before, between and after the records, and disagree on which: ``torch.load``
reads a pickle that is placed before the zip. So every byte of the file is accounted for.
"""

import io
import re
import struct
import zipfile

from sfl.errors import IntegrityError, quoted

Buffer = bytes | bytearray | memoryview

# The small records besides pickle and storages, and their allowed contents.
_ABOUT = {
    "version": re.compile(rb"\d{1,4}\n"),
    "byteorder": re.compile(rb"little"),
    ".format_version": re.compile(rb"\d{1,4}"),
    ".storage_alignment": re.compile(rb"\d{1,6}"),
    ".data/serialization_id": re.compile(rb"\d{1,64}"),
}
# The end-of-directory record (22 bytes); its zip64 form, which is followed by a locator of 20
# bytes; the 32-bit size that refers to the zip64 form.
_END, _END_64, _LOCATOR_BYTES, _IN_64 = (
    struct.Struct("<4s4H2LH"),
    struct.Struct("<4sQ2H2L4Q"),
    20,
    2**32 - 1,
)
# The local header of a record; its two kinds of extra field; the data descriptors after its data.
_HEAD = struct.Struct("<4s5H3L2H")
_PADDING, _LARGE = b"FB", b"\1\0"  # alignment; zip64 sizes
_DESCRIPTOR_32, _DESCRIPTOR_64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
_HAS_DESCRIPTOR = 8  # the flag of a data descriptor
_ENTRY_BYTES = 256  # bound on a directory entry; torch's take less than half
# FOLDER/RECORD; torch names the folder after the file.
_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})/(.+)")
_STORAGE = re.compile(r"data/(0|[1-9]\d{0,8})")
PICKLE = "data.pkl"


def _directory_bytes(data: Buffer) -> int:
    """Return the declared size of the container's directory, as ``zipfile`` will read it."""
    if len(data) < _END.size or data[-_END.size :][:4] != b"PK\5\6":  # also refuses a zip comment
        raise IntegrityError("no whole torch.save file: its end is not there")
    size = _END.unpack(data[-_END.size :])[5]
    where = len(data) - _END.size - _LOCATOR_BYTES - _END_64.size
    if where >= 0 and data[where : where + 4] == b"PK\6\6":
        large = _END_64.unpack(data[where : where + _END_64.size])[8]
        size = large if size == _IN_64 else max(size, large)
    return int(size)


def read_records(data: Buffer, num_tensors: int) -> dict[str, bytes]:
    """Return the contents of a container's records by name, without the folder; check their CRCs.

    Raises:
        IntegrityError: the container is not what ``torch.save`` writes for ``num_tensors`` tensors.
        zipfile.BadZipFile, and other errors of ``zipfile``: the container is damaged.
    """
    records: dict[str, bytes] = {}
    if _directory_bytes(data) > _ENTRY_BYTES * (len(_ABOUT) + 1 + num_tensors):
        raise IntegrityError("has more records than its tensors need")
    with zipfile.ZipFile(io.BytesIO(data)) as container:
        listed = container.infolist()
        if any(r.compress_type != zipfile.ZIP_STORED for r in listed):
            raise IntegrityError("has compressed records, which torch.save never writes")
        if sum(record.file_size for record in listed) > len(data):
            raise IntegrityError("declares more bytes than it has")
        for record in listed:
            found = _NAME.fullmatch(record.filename)
            inner = found[2] if found else ""
            if not (inner == PICKLE or inner in _ABOUT or _STORAGE.fullmatch(inner)):
                raise IntegrityError(
                    f"has a record {quoted(record.filename)}, which is no tensor's"
                )
            if inner in records:
                raise IntegrityError(f"has two records {quoted(inner)}")
            if record.filename.partition("/")[0] != listed[0].filename.partition("/")[0]:
                raise IntegrityError("has records in more than one folder")
            records[inner] = container.read(record)  # compares the checksum
            if inner in _ABOUT and not _ABOUT[inner].fullmatch(records[inner]):
                raise IntegrityError(f"has a record {inner!r} of {quoted(records[inner], 40)}")
        _check_layout(data, listed, int(container.start_dir or 0))
    if PICKLE not in records:
        raise IntegrityError("has no pickle")
    return records


def _check_layout(data: Buffer, listed: list[zipfile.ZipInfo], directory: int) -> None:
    """Check that records and directory cover the file without a gap.

    A gap might hold a second pickle, which runs code when another program loads the file.
    """
    at = 0
    records = sorted(listed, key=lambda record: record.header_offset)
    for record, end in zip(
        records, [*(r.header_offset for r in records[1:]), directory], strict=True
    ):
        if record.header_offset != at:
            raise IntegrityError(f"has bytes before its record {quoted(record.filename)}")
        at = end
        head = _HEAD.unpack(data[record.header_offset : record.header_offset + _HEAD.size])
        start = record.header_offset + _HEAD.size + head[-2]
        extra = bytes(data[start : start + head[-1]])
        after = bytes(data[start + head[-1] + record.file_size : end])
        if not (_is_padding(extra) and after in _descriptors(record)):
            raise IntegrityError(f"has bytes around its record {quoted(record.filename)}")
        if record.comment or not _is_padding(record.extra):
            raise IntegrityError(f"has bytes beside its record {quoted(record.filename)}")
    rest = len(data) - directory - _directory_bytes(data)
    if rest not in (_END.size, _END.size + _LOCATOR_BYTES + _END_64.size):
        raise IntegrityError("has bytes after its directory")


def _descriptors(record: zipfile.ZipInfo) -> tuple[bytes, ...]:
    """Return what may follow a record's data: a data descriptor if its flag is set."""
    if not record.flag_bits & _HAS_DESCRIPTOR:
        return (b"",)
    sizes = record.CRC, record.file_size, record.file_size
    kinds = (_DESCRIPTOR_64, _DESCRIPTOR_32)[: 2 if record.file_size < _IN_64 else 1]
    return tuple(kind.pack(b"PK\7\10", *sizes) for kind in kinds)


def _is_padding(extra: bytes) -> bool:
    """Return whether a record's extra fields are those that ``torch.save`` writes."""
    while extra:
        kind, size = extra[:2], int.from_bytes(extra[2:4], "little")
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        padding = kind == _PADDING and not body.strip(b"Z")
        large = kind == _LARGE and size in (8, 16, 24)
        if len(body) != size or not (padding or large):
            return False
    return True
