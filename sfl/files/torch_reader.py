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
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sfl.errors import IntegrityError, quoted, shortened
from sfl.files.torch_container import PICKLE, read_records
from sfl.files.torch_container import Buffer as Buffer  # others have it from here

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
# Torch's pickle takes less than half as much: for itself and for each tensor, beside its name.
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
        records = read_records(data, len(keys))
        room = _PICKLE_BYTES + sum(_TENSOR_PICKLE_BYTES + len(key.encode()) for key in keys)
        if len(records[PICKLE]) > room:
            raise IntegrityError("has a pickle that is larger than its tensors need")
        content = _Walk(records[PICKLE]).content
        _check_storages(content, records)
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error}") from error
    except Exception as error:  # what zipfile and pickletools raise for damage is of many kinds
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
