"""Strict parsing of untrusted JSON: bounded depth, no duplicate fields, bounded integers.

Messages, manifests, checkpoints and recorded options are parsed here. Python's ``json`` accepts
duplicate fields, recurses without a limit, and takes a minute for an integer of very many digits.
"""

import json
import math
import re
from typing import Any

from sfl.errors import shortened

MAX_DEPTH = 16
MAX_DIGITS = 24  # of an integer
# A string (to its closing quote or the end of the text) or a bracket; never backtracks.
_PART = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(text: bytes | bytearray) -> Any:
    """Return the value of a JSON text in UTF-8.

    ``NaN`` and ``Infinity`` are accepted, as Python writes them; ``1e999`` is refused.

    Raises:
        ValueError: the text is not JSON or exceeds a limit.
    """
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        _check_depth(text)
    value = _DECODER.decode(text.decode("utf-8"))
    if _SURROGATE.search(text):  # a lone surrogate cannot be encoded again
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _check_depth(text: bytes | bytearray) -> None:
    depth = 0
    for part in _PART.finditer(text):
        depth += (part[0] in (b"[", b"{")) - (part[0] in (b"]", b"}"))
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"it has a number {shortened(digits, 20)} that no float holds")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer, parse_float=_number)
