"""Encoding and decoding of ``torch.save`` files of a tensor or a state dict.

The only module that calls ``torch.save`` and ``torch.load``. Input is not trusted. A file that
equals byte for byte what we would write is decoded by ``torch_template``, in microseconds. For any
other, ``torch_reader`` checks container and pickle, the described tensors are compared with the
expected ones, torch loads the checked parts (``weights_only``, onto the CPU), and the result is
compared once more.
"""

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sfl.errors import IntegrityError, quoted
from sfl.files.checksum import File, checksum, checksum_text, crc_of
from sfl.files.torch_reader import Buffer, Described, take_apart
from sfl.files.torch_template import Template

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
DTYPES = frozenset(_DTYPES.values())  # that files may hold

# Besides its data, each tensor takes a zip record (two headers, up to 64 bytes of alignment) and
# its entry in the pickle. Measured with torch 2.15: 1,400 bytes for one tensor, under 600 for each
# further one. Both are doubled here.
_FILE_OVERHEAD_BYTES = 4096
_TENSOR_OVERHEAD_BYTES = 1200
# Bounds of a file whose names are not known beforehand: of 10,000 tensors, names of 200 bytes.
_ANY_NAMES = ("x" * 200,) * 10_000


class TensorSpec(NamedTuple):
    """The dtype and shape that a tensor must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def compare(self, found: "TensorSpec", name: str) -> None:
        """Raise ``IntegrityError`` if a file's tensor has another dtype or shape."""
        if found != self:
            raise IntegrityError(
                f"{name}: holds {_text(found)}, but {_text(self)} is expected here"
            )

    def check(self, tensor: object, name: str) -> Tensor:
        """Return ``tensor`` if it has this dtype and shape, is dense, and owns its storage.

        A view would carry its whole storage along: other samples of the sender's data.

        Raises:
            IntegrityError: it is anything else.
        """
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            raise IntegrityError(f"{name}: holds no plain dense tensor")
        if tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise IntegrityError(f"{name}: holds a tensor of a kind that never travels")
        self.compare(TensorSpec.of(tensor), name)
        if not owns_storage(tensor):
            raise IntegrityError(f"{name}: its tensor is a view, not the owner of its storage")
        return tensor


def _text(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


StateSpec = Mapping[str, TensorSpec]
Allocate = Callable[[TensorSpec], Tensor]  # memory for a tensor, not filled


def state_spec(state: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return name, dtype and shape of every tensor of a state dict."""
    return {name: TensorSpec.of(tensor) for name, tensor in state.items()}


def owns_storage(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous and its storage holds no other elements."""
    storage_bytes = tensor.untyped_storage().nbytes()
    return tensor.is_contiguous() and bool(storage_bytes == tensor.numel() * tensor.itemsize)


def identical(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two CPU tensors are equal bit for bit; a NaN equals the same NaN."""
    if TensorSpec.of(ours) != TensorSpec.of(theirs):
        return False
    return _data(ours.contiguous()).tobytes() == _data(theirs.contiguous()).tobytes()


def compact(tensor: Tensor) -> Tensor:
    """Return the tensor detached, on the CPU, contiguous and owning its storage."""
    tensor = tensor.detach().cpu()
    return tensor if owns_storage(tensor) else tensor.contiguous().clone()


def encode(tensor: Tensor) -> bytes:
    """Return the ``torch.save`` file of one tensor, compacted."""
    return bytes(encode_file(tensor).data)


def encode_file(tensor: Tensor) -> File:
    """Return the ``torch.save`` file of one tensor, compacted, with the file's checksum."""
    tensor = tensor.detach().cpu().contiguous()
    if template := _template(TensorSpec.of(tensor)):
        data, crc = template.fill_checked(_data(tensor))
        return File(data, checksum_text(crc))
    data = _save(compact(tensor))
    return File(data, checksum(data))


def _data(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    # numpy has no bfloat16
    known = tensor.reshape(-1).view(torch.uint8) if tensor.dtype is torch.bfloat16 else tensor
    return known.numpy().data


def encode_state(state: Mapping[str, Tensor]) -> bytes:
    """Return the ``torch.save`` file of a dict of tensors, each compacted."""
    return _save({name: compact(tensor) for name, tensor in state.items()})


@functools.lru_cache(maxsize=256)
def _file_sizes(spec: TensorSpec) -> range:
    """Return the possible sizes in bytes of a file with one tensor of this spec."""
    return range(spec.num_bytes, max_file_bytes([spec]) + 1)


@functools.lru_cache(maxsize=256)
def _template(spec: TensorSpec) -> Template | None:
    """Return the template for files with one tensor of this spec; None if there is none."""
    # Not every byte is a valid bool; dtypes outside the table are never read.
    if not spec.num_bytes or spec.dtype not in _DTYPES.values() or spec.dtype is torch.bool:
        return None
    count = spec.num_bytes

    def write(byte: int) -> bytes:
        data = torch.full((count,), byte, dtype=torch.uint8)
        return _save(data.view(spec.dtype).reshape(spec.shape))

    return Template.of(write)


def _save(content: Tensor | dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def max_file_bytes(specs: Iterable[TensorSpec]) -> int:
    """Return an upper bound in bytes on the size of a file that holds tensors of these specs."""
    sizes = [spec.num_bytes + _TENSOR_OVERHEAD_BYTES for spec in specs]
    return _FILE_OVERHEAD_BYTES + sum(sizes)


def max_state_bytes(spec: StateSpec) -> int:
    """Return an upper bound in bytes on the size of a file that holds a state dict of this spec."""
    # The pickle has each name once, in UTF-8.
    return max_file_bytes(spec.values()) + sum(len(name.encode()) for name in spec)


def decode(data: Buffer, spec: TensorSpec, name: str, checksum: str = "") -> Tensor:
    """Return the tensor in a ``torch.save`` file: ``spec.shape``, ``spec.dtype``, on the CPU.

    ``name`` is the file's name in errors; ``checksum`` is the file's, if it has been verified.

    Raises:
        IntegrityError: the file is damaged or holds anything else.
    """
    found = _decode_ours(data, spec, checksum)
    return _decode_any(data, spec, name) if found is None else found


def decode_file(
    file: File, spec: TensorSpec, name: str, allocate: Allocate | None = None
) -> tuple[Tensor, File]:
    """Return the tensor in a peer's file, and the file to store.

    The file to store is what we write for this tensor: the peer's bytes if they equal it. The
    tensor is then in memory that ``allocate`` gives for its spec, if that is given.

    Raises:
        IntegrityError: as ``decode``.
    """
    found = _decode_ours(file.data, spec, file.checksum, allocate)
    if found is not None:
        return found, file
    tensor = _decode_any(file.data, spec, name)
    return tensor, encode_file(tensor)


def _decode_ours(
    data: Buffer, spec: TensorSpec, checksum: str, allocate: Allocate | None = None
) -> Tensor | None:
    """Return the tensor in a file that equals what we write byte for byte; else None."""
    # Making a template takes memory of the tensor's size, so the file's size is compared first.
    if (
        len(data) in _file_sizes(spec)
        and (template := _template(spec))
        and (found := template.data_of(data, crc_of(checksum))) is not None
    ):
        if allocate is None:
            return torch.frombuffer(bytearray(found), dtype=spec.dtype).reshape(spec.shape)
        tensor = allocate(spec)
        tensor.reshape(-1).view(torch.uint8).numpy().data[:] = found
        return tensor
    return None


def _decode_any(data: Buffer, spec: TensorSpec, name: str) -> Tensor:
    saved = take_apart(data, name)
    _compare(saved.content, spec, name)
    return spec.check(_load(saved.rebuilt(), name), name)


def decode_state(
    data: Buffer, spec: StateSpec, name: str, *, or_empty: bool = False
) -> dict[str, Tensor]:
    """Return the dict of tensors in a ``torch.save`` file, in the order of ``spec``.

    With ``or_empty``, an empty dict is accepted as well.

    Raises:
        IntegrityError: the file is damaged or holds anything else.
    """
    saved = take_apart(data, name, spec.keys())
    if or_empty and saved.content == {}:
        return {}
    if not isinstance(saved.content, Mapping) or saved.content.keys() != spec.keys():
        raise IntegrityError(f"{name}: holds other tensors than this model's")
    for key, described in saved.content.items():
        _compare(described, spec[key], f"{name}, {key}")
    state = _load(saved.rebuilt(), name)
    if not isinstance(state, dict) or state.keys() != spec.keys():
        raise IntegrityError(f"{name}: holds other tensors than it describes")
    return {key: spec[key].check(state[key], f"{name}, {key}") for key in spec}


def decode_named(data: Buffer, name: str) -> dict[str, Tensor]:
    """Return the tensors of a ``torch.save`` file by their names, whatever these are.

    For a file that the user names; what a peer sends is compared with a spec, by ``decode_state``.

    Raises:
        IntegrityError: the file is damaged, or holds no dict of tensors.
    """
    content = take_apart(data, name, _ANY_NAMES).content
    if not isinstance(content, Mapping):
        raise IntegrityError(f"{name}: holds one tensor, and no dict of them by their names")
    spec = {key: TensorSpec(d.shape, _DTYPES[d.storage]) for key, d in content.items()}
    return decode_state(data, spec, name)


def _compare(described: object, spec: TensorSpec, name: str) -> None:
    """Raise ``IntegrityError`` unless the file describes one tensor of this spec."""
    if not isinstance(described, Described):
        raise IntegrityError(f"{name}: holds no plain dense tensor, but several by their names")
    spec.compare(TensorSpec(described.shape, _DTYPES[described.storage]), name)


def _load(stream: io.BytesIO, name: str) -> object:
    try:
        return torch.load(stream, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a dozen types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise IntegrityError(f"{name}: torch does not load it: {quoted(reason, 120)}") from error


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether the sum of squares of each tensor is finite in float32.

    Stricter than ``isfinite``: it also refuses numbers so large that a norm, a variance or Adam's
    second moment overflows, which ruins the weights for good.
    """
    return all(map(bool, finite_flags(tensors)))


def finite_flags(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return whether ``are_finite`` holds for the tensors of each device: () bool, there."""
    dense = (t.coalesce().values() if t.is_sparse else t for t in tensors)
    flat = (t.detach().reshape(-1).float() for t in dense if t.is_floating_point())
    squares: dict[torch.device, list[Tensor]] = {}
    for values in flat:
        squares.setdefault(values.device, []).append(torch.dot(values, values))
    return [torch.stack(found).isfinite().all() for found in squares.values()]
