"""Check what a ``torch.save`` file holds, without torch and without running its pickle.

``torch.load(weights_only=True)`` alone is not safe for an untrusted file, because it believes the
sizes that container and pickle declare. So this module checks the file first::

    container   only stored records of known names, each once, with correct checksums, and no byte
                before, between or after them
    pickle      only opcodes that tensors and dicts of tensors need; interpreted here, not run
    tensors     each with its own storage, which holds exactly its elements

Torch then loads a new file that is made of the checked records.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sfl.errors import IntegrityError, quoted, shortened
from sfl.files.torch_container import PICKLE, read_records
from sfl.files.torch_container import Buffer as Buffer  # re-exported

# The storage types that files may hold, and the bytes of an element.
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1,
}  # fmt: skip
# The other names in a pickle of tensors: the function that rebuilds a tensor, and the type of its
# backward hooks, which are always empty.
_REBUILD, _HOOKS = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
MAX_DIMENSIONS = 8
# Bounds on the size of a pickle: in all, and for each tensor besides its name; torch's takes less
# than half.
_PICKLE_BYTES, _TENSOR_PICKLE_BYTES = 1024, 400
_PROTOCOL = 2


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as its file describes it."""

    storage: str  # FloatStorage, ...
    key: str  # of the storage's record
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """The checked parts of a file."""

    content: Described | Mapping[str, Described]
    records: Mapping[str, bytes]  # by name, without the folder

    def rebuilt(self) -> io.BytesIO:
        """Return a new file made of these records."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as container:
            for name, data in self.records.items():
                container.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        stream.seek(0)
        return stream


def take_apart(data: Buffer, name: str, keys: Collection[str] = ("",)) -> Saved:
    """Check a file's container, its pickle and the tensors that it describes.

    ``name`` is the file's name in errors. ``keys`` are the names of the tensors that the file may
    hold; they bound the sizes of directory and pickle.

    Raises:
        IntegrityError: the file is damaged, or holds neither a tensor nor a dict of tensors.
    """
    try:
        records = read_records(data, len(keys))
        room = _PICKLE_BYTES + sum(_TENSOR_PICKLE_BYTES + len(key.encode()) for key in keys)
        if len(records[PICKLE]) > room:
            raise IntegrityError("has a pickle that is larger than its tensors need")
        content = _Walk(records[PICKLE]).content
        _check_storages(content, records)
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error}") from error
    except Exception as error:  # zipfile and pickletools raise many types for damage
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise IntegrityError(f"{name}: no whole torch.save file: {quoted(reason, 120)}") from error
    return Saved(content, records)


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
    """Interpret a pickle: note what it would build, without building or calling anything."""

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
            end = int(place or 0) + 1  # after STOP, which is one byte
        if end != len(data):
            raise IntegrityError("has bytes behind the end of its pickle")
        (content,) = self.take(1)
        if self._stack or self._marks or not isinstance(content, Described | dict):
            raise IntegrityError("holds no plain dense tensor, nor a dict of them")
        self.content: Described | dict[str, Described] = content

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def take(self, count: int | None = None) -> tuple[Any, ...]:
        """Pop the topmost ``count`` values off the stack, or all since the last mark."""
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
        if index != len(self._memo):  # picklers count up; a large index would allocate memory
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
        """Note a storage: ("storage", type, key, "cpu", number of elements)."""
        match self.take(1)[0]:
            case ("storage", _Global(kind), str(key), "cpu", int(count)):
                self.push(_Storage(kind.removeprefix("torch "), key, count))
            case _:
                raise IntegrityError("describes a storage that never travels")

    def call(self) -> None:
        """Note what a call would build: a tensor or an empty dict of hooks."""
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
    """Return the description of a contiguous tensor that covers its whole storage."""
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
    """Check that the container has exactly the storages that the tensors need, of their sizes."""
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
