"""One part of a trained model as a file for others: its weights, and what they need to use it.

``sfl-export --to torch`` writes it. It is a ``torch.save`` file of a state dict with one entry
more, ``about``: the JSON text of ``About``, as bytes (uint8). Plain torch loads it::

    state = torch.load(path, weights_only=True)
    about = json.loads(bytes(state.pop("about")))
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfl.errors import IntegrityError, RunError, quoted
from sfl.files import strict_json
from sfl.files.atomic import write_file
from sfl.files.torch_file import decode_named, encode_state

FORMAT = 1
WHOLE = "whole"  # the part that is all segments, joined
ENTRY = "about"  # no name of a weight, which has its block's name in front: "fc1.weight"


@dataclass(frozen=True)
class About:
    """What a part of a trained model is, and what it expects.

    Pixels are in [0, 1], minus ``mean``, divided by ``std``, before they enter the first segment.
    """

    part: str  # "whole", or a segment's name: "front", "back", "client_head"
    model: str  # its name in MODELS, or the user's own package.module:function
    cuts: tuple[int, ...]  # of the whole model; none for a scheme without a cut
    task: str
    input_shape: tuple[int, ...]  # of one sample, as the first segment takes it
    takes: tuple[int, ...]  # of one sample, as this part takes it: activations behind a cut
    mean: tuple[float, ...]  # one value, or one for each channel
    std: tuple[float, ...]
    classes: tuple[str, ...]
    run: str
    seed: int
    round: int  # after which the weights are, from 0; -1: before the first
    back_checksum: str  # of the server's segments then; "" if there are none, or not with the rest
    sfl_version: str
    format: int = FORMAT

    def to_json(self) -> str:
        """Return this as a JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes) -> "About":
        """Return what a JSON text says, checked.

        Raises:
            ValueError: the text is no JSON, or a field is missing, unknown, or no such value.
        """
        values = strict_json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no table")
        if values.get("format") != FORMAT:
            raise ValueError(
                f"its format is {quoted(values.get('format'))}; this SFL reads {FORMAT}"
            )
        if values.keys() != _CHECKS.keys():
            raise ValueError(f"its fields are not {', '.join(_CHECKS)}")
        for name, value in values.items():
            if not _CHECKS[name](value):
                raise ValueError(f"its {name} is {quoted(value)}")
        fields: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in values.items()}
        return cls(**fields)


def _is_name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 200


def _is_shape(value: Any) -> bool:
    return _are(value, lambda n: type(n) is int and 0 < n < 2**31) and 0 < len(value) <= 8


def _are(value: Any, fits: Callable[[Any], bool]) -> bool:
    return type(value) is list and len(value) <= 10_000 and all(map(fits, value))


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "part": _is_name,
    "model": _is_name,
    "cuts": lambda value: _are(value, lambda n: type(n) is int and 0 <= n < 10_000),
    "task": _is_name,
    "input_shape": _is_shape,
    "takes": _is_shape,
    "mean": lambda value: _are(value, _is_number) and value != [],
    "std": lambda value: _are(value, lambda n: _is_number(n) and n > 0) and value != [],
    "classes": lambda value: _are(value, lambda name: type(name) is str) and value != [],
    "run": _is_name,
    "seed": lambda value: type(value) is int,
    "round": lambda value: type(value) is int and -1 <= value < 2**31,
    "back_checksum": lambda value: type(value) is str and len(value) <= 64,
    "sfl_version": _is_name,
    "format": lambda value: type(value) is int,
}


@dataclass(frozen=True)
class Portable:
    """The weights of one part of a trained model, by their names in the whole one."""

    state: Mapping[str, Tensor]
    about: About


def encode_portable(portable: Portable) -> bytes:
    """Return the bytes of the file."""
    text = np.frombuffer(portable.about.to_json().encode(), np.uint8)
    return encode_state({**portable.state, ENTRY: torch.from_numpy(text.copy())})


def write_portable(path: Path | str, portable: Portable) -> None:
    """Write the file, whole or not at all."""
    write_file(path, encode_portable(portable))


def read_portable(path: Path | str) -> Portable:
    """Return what the file holds, checked; it may come from strangers, and cannot run code.

    Whether the weights fit a model is for ``load_state_dict`` to say.

    Raises:
        RunError: the file cannot be read.
        IntegrityError: it is damaged, or no file of ``sfl-export --to torch``.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    state = decode_named(data, str(path))
    text = state.pop(ENTRY, None)
    if text is None or text.dtype is not torch.uint8 or text.dim() != 1:
        raise IntegrityError(
            f"{path}: is a torch file, but none that sfl-export --to torch writes: it has no entry"
            f" {ENTRY!r} that says what the weights are"
        )
    try:
        return Portable(state, About.from_json(text.numpy().tobytes()))
    except ValueError as error:
        raise IntegrityError(
            f"{path}: what it says about its weights is strange: {error}"
        ) from error
