"""What a ``torch.save`` file holds, found out without torch and without running its pickle.

``torch.load(weights_only=True)`` alone is not enough for a file of an unknown sender: it believes
what the container and the pickle declare. So a file is taken apart here first::

    container   stored records of known names, each once, with their checksums, and nothing else:
                no byte before, between or behind them
    pickle      the opcodes of tensors and of dicts of tensors, walked by hand; they name storages
    tensors     each a storage of its own, of exactly its elements, from the first to the last

and put together again from the records that passed: that is all that torch gets to see.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sfl.errors import IntegrityError, quoted, shortened

Buffer = bytes | bytearray | memoryview

# The storages that travel, and the bytes of an element.
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip
# All else that a pickle of tensors names: what makes a tensor, and its backward hooks, of which
# there are none.
_REBUILD, _HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
MAX_DIMENSIONS = 8
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
# What torch writes takes less than half as much: of the directory for each record, of the pickle
# for itself and for each tensor, beside its name.
_ENTRY_BYTES, _PICKLE_BYTES, _TENSOR_PICKLE_BYTES = 256, 1024, 400
# The folder is that of the file's own name.
_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})/(.+)")
_STORAGE = re.compile(r"data/(0|[1-9]\d{0,8})")
_PICKLE, _PROTOCOL = "data.pkl", 2


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as its file describes it."""

    storage: str  # FloatStorage, ...
    key: str  # of the storage's record
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """A file whose parts have been checked."""

    content: Described | Mapping[str, Described]
    records: Mapping[str, bytes]  # by their names without the folder

    def rebuilt(self) -> io.BytesIO:
        """Return the same file, put together anew from its records."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as container:
            for name, data in self.records.items():
                container.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        stream.seek(0)
        return stream


def take_apart(data: Buffer, name: str, keys: Collection[str] = ("",)) -> Saved:
    """Check a file's container, its pickle and the tensors that it describes.

    ``name`` says in errors which file it is; ``keys`` are the names of the tensors that it may
    hold, which bound what is read of container and pickle, whatever the file's length.

    Raises:
        IntegrityError: it is damaged, or no file of a tensor or of a dict of tensors.
    """
    try:
        records = _records(data, len(keys))
        room = _PICKLE_BYTES + sum(_TENSOR_PICKLE_BYTES + len(key.encode()) for key in keys)
        if len(records[_PICKLE]) > room:
            raise IntegrityError("has a pickle that is larger than its tensors need")
        content = _Walk(records[_PICKLE]).content
        _check_storages(content, records)
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error}") from error
    except Exception as error:  # what zipfile and pickletools raise for damage is of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise IntegrityError(f"{name}: no whole torch.save file: {quoted(reason, 120)}") from error
    return Saved(content, records)


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


def _records(data: Buffer, num_tensors: int) -> dict[str, bytes]:
    """Return the records of a container by their names, whose checksums are right."""
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
            if not (inner == _PICKLE or inner in _ABOUT or _STORAGE.fullmatch(inner)):
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
    if _PICKLE not in records:
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


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    count: int  # of elements


_NO_HOOKS = object()


class _Walk:
    """One walk through a pickle: what it would build is written down, nothing is built."""

    def __init__(self, data: bytes) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        end = -1
        for opcode, argument, place in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise IntegrityError(f"asks for {opcode.name}, which no tensor needs")
            if (opcode.name == "PROTO") != (place == 0):
                raise IntegrityError("has a pickle that begins as none of torch's")
            _OPCODES[opcode.name](self, argument)
            end = int(place or 0) + 1  # behind STOP, which is one byte
        if end != len(data):
            raise IntegrityError("has bytes behind the end of its pickle")
        (content,) = self.take(1)
        if self._stack or self._marks or not isinstance(content, Described | dict):
            raise IntegrityError("holds no plain dense tensor, nor a dict of them")
        self.content: Described | dict[str, Described] = content

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def take(self, count: int | None = None) -> tuple[Any, ...]:
        """Take the topmost values off the stack: so many, or all since the last mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IntegrityError("has a pickle that takes more than it has")
        values = tuple(self._stack[start:])
        del self._stack[start:]
        return values

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def protocol(self, version: int) -> None:
        if version != _PROTOCOL:
            raise IntegrityError(f"has a pickle of protocol {version}, not {_PROTOCOL}")

    def put(self, index: int) -> None:
        if index != len(self._memo):  # picklers count; an unpickler makes room for any index
            raise IntegrityError(f"has a pickle that puts {index} where {len(self._memo)} is next")
        self._memo.append(self._stack[-1])

    def get(self, index: int) -> None:
        if index >= len(self._memo):
            raise IntegrityError(f"has a pickle that gets {index}, which it never put")
        self.push(self._memo[index])

    def name(self, name: str) -> None:
        if name not in (_REBUILD, _HOOKS) and name.removeprefix("torch ") not in ITEM_BYTES:
            raise IntegrityError(f"asks for {ascii(shortened(name, 60))[1:-1]}, which is no tensor")
        self.push(_Global(name))

    def storage(self) -> None:
        """Note a storage: ("storage", its type, its key, "cpu", how many elements it has)."""
        match self.take(1)[0]:
            case ("storage", _Global(kind), str(key), "cpu", int(count)):
                self.push(_Storage(kind.removeprefix("torch "), key, count))
            case _:
                raise IntegrityError("describes a storage that never travels")

    def call(self) -> None:
        """Note what a call would build: a tensor, or its empty dict of hooks."""
        match self.take(2):
            case (_Global(name), ()) if name == _HOOKS:
                self.push(_NO_HOOKS)
            case (
                _Global(name),
                (_Storage() as storage, 0, tuple(shape), tuple(strides), False, hooks),
            ) if name == _REBUILD and hooks is _NO_HOOKS:
                self.push(_described(storage, shape, strides))
            case _:
                raise IntegrityError("asks for what is no tensor that owns its storage")

    def fill(self, pairs: tuple[Any, ...]) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, dict) or len(pairs) % 2:
            raise IntegrityError("fills what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not (isinstance(key, str) and isinstance(value, Described)) or key in target:
                raise IntegrityError("holds more than tensors by their names, each once")
            target[key] = value


_OPCODES: dict[str, Callable[[_Walk, Any], None]] = {
    "PROTO": _Walk.protocol,
    "STOP": lambda walk, _: None,
    "MARK": lambda walk, _: walk.mark(),
    "BINPUT": _Walk.put,
    "LONG_BINPUT": _Walk.put,
    "BINGET": _Walk.get,
    "LONG_BINGET": _Walk.get,
    "BININT": _Walk.push,
    "BININT1": _Walk.push,
    "BININT2": _Walk.push,
    "LONG1": _Walk.push,
    "BINUNICODE": _Walk.push,
    "NEWFALSE": lambda walk, _: walk.push(False),
    "EMPTY_TUPLE": lambda walk, _: walk.push(()),
    "TUPLE": lambda walk, _: walk.push(walk.take()),
    "TUPLE1": lambda walk, _: walk.push(walk.take(1)),
    "TUPLE2": lambda walk, _: walk.push(walk.take(2)),
    "TUPLE3": lambda walk, _: walk.push(walk.take(3)),
    "EMPTY_DICT": lambda walk, _: walk.push({}),
    "SETITEM": lambda walk, _: walk.fill(walk.take(2)),
    "SETITEMS": lambda walk, _: walk.fill(walk.take()),
    "GLOBAL": _Walk.name,
    "BINPERSID": lambda walk, _: walk.storage(),
    "REDUCE": lambda walk, _: walk.call(),
}


def _described(storage: _Storage, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> Described:
    """Return a tensor whose elements are those of its storage, in their order."""
    if not all(type(n) is int and 0 <= n < 2**63 for n in (storage.count, *shape, *strides)):
        raise IntegrityError("describes a tensor by what are no sizes")
    if len(shape) > MAX_DIMENSIONS or len(strides) != len(shape):
        raise IntegrityError(f"describes a tensor of more than {MAX_DIMENSIONS} dimensions")
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step and storage.count:
            raise IntegrityError("its tensor is a view, not the owner of its storage")
        step *= size
    if storage.count != step:
        raise IntegrityError("its tensor is a view, not the owner of its storage")
    return Described(storage.kind, storage.key, shape)


def _check_storages(
    content: Described | Mapping[str, Described], records: Mapping[str, bytes]
) -> None:
    """See that the container has the storages that the tensors need, of their size, and no more."""
    tensors = [content] if isinstance(content, Described) else content.values()
    by_key: dict[str, Described] = {}
    for tensor in tensors:
        if by_key.setdefault(tensor.key, tensor) != tensor:
            raise IntegrityError("has two tensors in one storage")
        num_bytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.storage]
        record = records.get(f"data/{tensor.key}")
        if record is None or len(record) != num_bytes:
            found = "none" if record is None else f"{len(record)}"
            raise IntegrityError(f"declares a storage of {num_bytes} bytes and has {found}")
    if unused := {n for n in records if n.startswith("data/")} - {f"data/{k}" for k in by_key}:
        raise IntegrityError(f"has a record {min(unused)!r} that no tensor has")
