"""The container of a ``torch.save`` file: a zip of stored records, and not a byte beside them.

A zip may have much that its readers pass over: bytes in front, gaps, comments. What one of them
passes over, another reads, as ``torch.load`` does with a pickle in front. So every byte counts.
"""

import io
import re
import struct
import zipfile

from sfl.errors import IntegrityError, quoted

Buffer = bytes | bytearray | memoryview

# Beside the pickle and the storages: small records about the file, and what they may hold.
_ABOUT = {
    "version": re.compile(rb"\d{1,4}\n"),
    "byteorder": re.compile(rb"little"),
    ".format_version": re.compile(rb"\d{1,4}"),
    ".storage_alignment": re.compile(rb"\d{1,6}"),
    ".data/serialization_id": re.compile(rb"\d{1,64}"),
}
# The last 22 bytes of a container; and those before its locator (20 bytes) where it is a large one.
_END, _END_64, _LOCATOR_BYTES, _IN_64 = (
    struct.Struct("<4s4H2LH"),
    struct.Struct("<4sQ2H2L4Q"),
    20,
    2**32 - 1,
)
# A record's head, which its name and more stand behind; what that may be; what may follow the data.
_HEAD = struct.Struct("<4s5H3L2H")
_PADDING, _LARGE = b"FB", b"\1\0"  # bytes up to a boundary; sizes of 4 GiB and more
_BEHIND_32, _BEHIND_64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
_HAS_BEHIND = 8  # a flag
_ENTRY_BYTES = 256  # of the directory for each record; torch takes less than half as much
# The folder is that of the file's own name.
_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})/(.+)")
_STORAGE = re.compile(r"data/(0|[1-9]\d{0,8})")
PICKLE = "data.pkl"


def _directory_bytes(data: Buffer) -> int:
    """Return how much of a container its directory is said to be, as ``zipfile`` will read it."""
    if len(data) < _END.size or data[-_END.size :][:4] != b"PK\5\6":  # no comment stands behind it
        raise IntegrityError("no whole torch.save file: its end is not there")
    size = _END.unpack(data[-_END.size :])[5]
    where = len(data) - _END.size - _LOCATOR_BYTES - _END_64.size
    if where >= 0 and data[where : where + 4] == b"PK\6\6":
        large = _END_64.unpack(data[where : where + _END_64.size])[8]
        size = large if size == _IN_64 else max(size, large)
    return int(size)


def read_records(data: Buffer, num_tensors: int) -> dict[str, bytes]:
    """Return the records of a container by their names without the folder; checksums are right.

    Raises:
        IntegrityError: it has others than ``torch.save`` writes for so many tensors, or more.
        zipfile.BadZipFile, and what else ``zipfile`` raises for damage.
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
            records[inner] = container.read(record)  # which compares the checksum
            if inner in _ABOUT and not _ABOUT[inner].fullmatch(records[inner]):
                raise IntegrityError(f"has a record {inner!r} of {quoted(records[inner], 40)}")
        _check_layout(data, listed, int(container.start_dir or 0))
    if PICKLE not in records:
        raise IntegrityError("has no pickle")
    return records


def _check_layout(data: Buffer, listed: list[zipfile.ZipInfo], directory: int) -> None:
    """See that records and directory follow one another from the first byte to the last.

    What else a container has room for, another program might read: it may be a pickle that runs
    code, in front of one that does not.
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
        behind = bytes(data[start + head[-1] + record.file_size : end])
        if not (_is_padding(extra) and behind in _may_stand_behind(record)):
            raise IntegrityError(f"has bytes around its record {quoted(record.filename)}")
        if record.comment or not _is_padding(record.extra):
            raise IntegrityError(f"has bytes beside its record {quoted(record.filename)}")
    rest = len(data) - directory - _directory_bytes(data)
    if rest not in (_END.size, _END.size + _LOCATOR_BYTES + _END_64.size):
        raise IntegrityError("has bytes behind its directory")


def _may_stand_behind(record: zipfile.ZipInfo) -> tuple[bytes, ...]:
    """Return what a record's data may be followed by: its checksum and sizes, if its head says."""
    if not record.flag_bits & _HAS_BEHIND:
        return (b"",)
    sizes = record.CRC, record.file_size, record.file_size
    small = record.file_size < _IN_64
    return tuple(kind.pack(b"PK\7\10", *sizes) for kind in (_BEHIND_64, _BEHIND_32)[: 1 + small])


def _is_padding(extra: bytes) -> bool:
    """Say whether what stands behind a record's name is what ``torch.save`` puts there."""
    while extra:
        kind, size = extra[:2], int.from_bytes(extra[2:4], "little")
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        padding = kind == _PADDING and not body.strip(b"Z")
        large = kind == _LARGE and size in (8, 16, 24)
        if len(body) != size or not (padding or large):
            return False
    return True
