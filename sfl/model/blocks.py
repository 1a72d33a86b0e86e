"""Checks of a model's row of blocks, and of its entries.

Models that are refused here would silently change when the row is cut or its weights are sent.
Blocks are counted from 0; an entry is a named parameter or buffer, such as ``2.weight``.
"""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sfl.errors import ConfigError, told
from sfl.files.torch_file import DTYPES

# Methods that a subclass of nn.Sequential may override: they do not change what is computed.
_HARMLESS = {"__init__", "__repr__", "extra_repr", "_get_name", "__dir__"}
_HARMLESS |= {"_load_from_state_dict", "_save_to_state_dict", "__init_subclass__"}
_BASES = (nn.Sequential, nn.Module, object)


def titled(index: int, block: nn.Module | None) -> str:
    """Return the name of a block in messages."""
    return f"block {index} ({type(block).__name__})"


def names_of(row: nn.Sequential) -> list[str]:
    """Return the names of a row's blocks; a block that is used twice has two names."""
    return list(row._modules)


def check_row(model: object) -> nn.Sequential:
    """Return the model, after checking that it is a plain row of blocks that can be cut.

    Raises:
        ConfigError: it is not, or its weights cannot be sent.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model's function must return an nn.Sequential of blocks, not a {kind}"
        )
    if not isinstance(model, nn.Sequential):
        names = [name for name, _ in model.named_children()]
        shown = ", ".join(f"net.{name}" for name in names[:6]) or "..."
        raise ConfigError(
            f"the model's function must return an nn.Sequential of blocks, not a {kind} with a"
            f" forward of its own, which cannot be cut: return nn.Sequential({shown}"
            f"{', ...' if len(names) > 6 else ''}) in the order of its forward, with what that does"
            " in between as blocks, such as nn.ReLU() and nn.Flatten()"
        )
    if own := _of_its_own(model):
        raise ConfigError(
            f"the model, a {kind}, is an nn.Sequential with {own} of its own, which its parts would"
            " lose: put that into a block (a residual, with all that it goes around, into one)"
        )
    for index, (name, block) in enumerate(model._modules.items()):
        if block is None:
            raise ConfigError(f"block {index} of the model is None")
        _check_block(titled(index, block), name, block)
    return model


def _of_its_own(model: nn.Sequential) -> str:
    """Return what a row has besides its blocks that affects its results; "" if nothing."""
    classes = [c for c in type(model).__mro__ if c not in _BASES]
    known = {n for n in dir(nn.Sequential) if callable(getattr(nn.Sequential, n))} - _HARMLESS
    named = known | {"__call__", "__getattribute__", "__iter__"}
    found = [n for c in classes if c.__module__ != "typing" for n in vars(c) if n in named]
    values = vars(model)
    found += [n for n in values if n in named or (n.endswith("hooks") and values[n])]
    found += ["torch.compile"] if values.get("_compiled_call_impl") else []
    if found:
        return "hooks" if found[0].endswith("hooks") else f"{found[0]}()"
    own = itertools.chain(model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    return next((f"a {_kind(entry)} {name!r}" for name, entry in own), "")


def _kind(entry: Tensor) -> str:
    return "parameter" if isinstance(entry, nn.Parameter) else "buffer"


def _check_block(title: str, name: str, block: nn.Module) -> None:
    """Check that a block's weights exist and can be sent."""
    for entry in itertools.chain(block.parameters(), block.buffers()):
        if is_lazy(entry):
            raise ConfigError(
                f"{title} is lazy, and has no weights before its first batch: give it its sizes,"
                " as in nn.Linear(784, 32) for nn.LazyLinear(32)"
            )
    for key, value in block.state_dict(prefix=f"{name}.").items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{title} has a state {key!r} that is no tensor, and cannot travel")
        if value.is_meta or value.layout is not torch.strided or value.dtype not in DTYPES:
            what = (
                "meta" if value.is_meta else f"{value.layout} {value.dtype}".replace("torch.", "")
            )
            raise ConfigError(f"{title} has {key!r} as a {what} tensor, which cannot travel")


def copied(row: nn.Sequential, first_block: int = 0) -> nn.Sequential:
    """Return a copy of a row; ``first_block``: index of its first block in the model.

    Raises:
        ConfigError: a block cannot be copied.
    """
    memo: dict[int, object] = {}
    copies: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (name, block) in enumerate(row._modules.items(), first_block):
        assert block is not None
        try:
            copies[name] = copy.deepcopy(block, memo)
        except Exception as error:  # a user's own block
            title = titled(index, block)
            raise ConfigError(f"{title} cannot be copied: {told(error)}") from error
    return nn.Sequential(copies)


def freeze(blocks: Iterable[nn.Module]) -> None:
    """Let blocks keep their weights and buffers in training: no gradients, evaluation mode.

    A segment leaves modules in evaluation mode that come so: BatchNorm uses and keeps its running
    statistics, and dropout passes everything.
    """
    for block in blocks:
        block.eval().requires_grad_(False)


@dataclass(frozen=True)
class Entries:
    """Names of a model's parameters by kind; all other entries are buffers."""

    trained: frozenset[str]
    frozen: frozenset[str] = frozenset()  # with ``requires_grad=False``
    same: Mapping[str, str] = field(default_factory=dict)  # tensors with several: name -> first

    @classmethod
    def of(cls, rows: Iterable[nn.Sequential]) -> "Entries":
        """Return the entries of a model's segments."""
        first: dict[int, str] = {}
        same: dict[str, str] = {}
        trained: set[str] = set()
        frozen: set[str] = set()
        entries = [item for row in rows for item in row.state_dict(keep_vars=True).items()]
        for name, entry in entries:
            if (known := first.setdefault(id(entry), name)) != name:
                same[name] = known
            elif isinstance(entry, nn.Parameter):
                (trained if entry.requires_grad else frozen).add(name)
        return cls(frozenset(trained), frozenset(frozen), same)


def check_no_shared_weights(rows: Sequence[nn.Sequential]) -> None:
    """Check that no weights are on both sides of a cut, where each side would train its own.

    Raises:
        ConfigError: some are.
    """
    names = [name for row in rows for name in row._modules]
    blocks = [block for row in rows for block in row]

    def place(name: str) -> int:
        return names.index(name.split(".")[0])

    for ours, theirs in itertools.combinations(rows, 2):
        memory: dict[int, list[tuple[str, Tensor]]] = {}
        for name, entry in _entries(ours):
            memory.setdefault(entry.untyped_storage().data_ptr(), []).append((name, entry))
        for name, entry in _entries(theirs):
            for other, theirs_too in memory.get(entry.untyped_storage().data_ptr(), []):
                if _overlap(entry, theirs_too):
                    first, second = place(other), place(name)
                    raise ConfigError(
                        f"{titled(first, blocks[first])} in front of the cut and"
                        f" {titled(second, blocks[second])} behind it share a {_kind(entry)}"
                        f" ({other!r}, {name!r}), of which each side would have its own: cut in"
                        f" front of block {first} or behind block {second}, give each its own, or"
                        " take a scheme without a cut"
                    )


def _entries(row: nn.Sequential) -> Iterator[tuple[str, Tensor]]:
    yield from row.named_parameters(remove_duplicate=False)
    yield from row.named_buffers(remove_duplicate=False)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one storage may share elements."""

    def ends(tensor: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    if not one.numel() or not other.numel():
        return False
    (start, end), (other_start, other_end) = ends(one), ends(other)
    return start < other_end and other_start < end
