"""The structure of a built model, compared between a client and its server.

Shapes of weights do not determine what a model computes: the activation function may differ. So a
client reports a digest of each block, and the server compares them with its own. A digest covers,
for each module: class name, training mode, ``extra_repr``, plain attributes, and names, shapes and
dtypes of parameters and buffers. It does not cover the code of a ``forward``, closure or lambda.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sfl.files.checksum import crc32

MAX_DIGESTS = 64  # of the model itself and its blocks; the last covers all remaining blocks
DIGEST, CHECKSUM = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{8}")
Blocks = list[list[str]]  # lines that describe the model itself, then each of its blocks
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def describe(model: nn.Module) -> Blocks:
    """Return the description of a model."""
    known: dict[int, str] = {}  # names of modules and tensors, by identity: one may be used twice
    blocks = [list(_lines_of_one("", model, known))]
    for name, block in model.named_children():
        blocks.append([])
        for path, module in block.named_modules(prefix=name, remove_duplicate=False):
            blocks[-1] += _lines_of_one(path, module, known)
    return blocks


def digests(blocks: Blocks, rebuild: Callable[[], Blocks]) -> tuple[str, ...]:
    """Return the digests of a model's description.

    ``rebuild`` describes a second build of the model; lines that differ, such as a time, are left
    out. It is not called if all modules are torch's.
    """
    if any(line.endswith(_OWN_CLASS) for block in blocks for line in block):
        blocks = [
            [line for line in block if line in set(other)]
            for block, other in zip(blocks, rebuild(), strict=True)
        ]
    rest = [line for block in blocks[MAX_DIGESTS - 1 :] for line in block]
    shown = [*blocks[: MAX_DIGESTS - 1], rest] if len(blocks) >= MAX_DIGESTS else blocks
    return tuple(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for lines in shown)


def difference(ours: Sequence[str], theirs: Sequence[str], names: Sequence[str]) -> str:
    """Return in words where two models differ; "" if they do not. ``names``: of our blocks."""
    if len(ours) != len(theirs):
        return f"it has {len(theirs) - 1} blocks instead of {len(ours) - 1}"
    differing = [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    if not differing:
        return ""
    first = differing[0]
    return f"block {names[first - 1]!r} differs" if first else "its class differs"


def weights_checksum(state: Mapping[str, Tensor]) -> str:
    """Return a checksum of the bytes of weights."""
    crc = 0
    for tensor in state.values():
        crc = crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


_OWN_CLASS = " (own)"


def _lines_of_one(path: str, module: nn.Module, known: dict[int, str]) -> Iterator[str]:
    """Yield the description of one module without its children."""
    if id(module) in known:
        yield f"{path} is {known[id(module)]}"
        return
    known[id(module)] = path
    kind = type(module)
    is_torch = kind.__module__.partition(".")[0] in ("torch", "torchvision")
    yield f"{path}: {_name_of(kind)}{'' if is_torch else _OWN_CLASS}"
    yield f"{path} {'trains' if module.training else 'evaluates'}"
    yield f"{path} says {_extra_repr(module)}"
    for name, value in sorted(vars(module).items()):
        if name not in _OF_ANY_MODULE and not (is_torch and name.startswith("_")):
            yield f"{path}.{name} = {_plain(value)}"
    for what, tensors in (
        ("parameter", module.named_parameters(recurse=False)),
        ("buffer", module.named_buffers(recurse=False)),
    ):
        for name, tensor in tensors:
            same = known.setdefault(id(tensor), f"{path}.{name}")
            shape, trains = list(tensor.shape), tensor.requires_grad
            yield f"{path}.{name}: {what} {same} {tensor.dtype} {shape} {trains}"


def _extra_repr(module: nn.Module) -> str:
    try:
        return _ADDRESS.sub("", module.extra_repr())
    except Exception:  # noqa: BLE001 - a user's own code, meant for display
        return ""


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _plain(value: Any) -> str:
    """Return a value as text that is equal on every machine; for other values, their class.

    A text with a path differs between machines.
    """
    if isinstance(value, str):
        return "a path" if "/" in value or "\\" in value else repr(_ADDRESS.sub("", value))
    if value is None or isinstance(value, bool | int | float | complex | torch.dtype):
        return repr(value)
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_plain, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_plain(k)}: {_plain(v)}' for k, v in value.items()))}}}"
    if isinstance(value, functools.partial):
        return f"partial {_plain([value.func, value.args, value.keywords])}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name_of(value)
    return f"a {_name_of(type(value))}"
