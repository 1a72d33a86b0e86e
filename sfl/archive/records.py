"""Checks of untrusted values about clients' data and machines, from a client or a file.

Every ``*_of`` function returns its value with the right types, or raises ``ValueError``.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
PARTS = ("train", "validation", "test")
MAX_CLASSES = 1000
MAX_DIMENSIONS = 4  # of a sample
MAX_ELEMENTS = 2**24  # of a sample: 4096 x 4096
MAX_COUNT = 2**31
MAX_RANKS = 100_000
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CLIENT = re.compile(r"0|[1-9]\d{0,8}")


def shape_of(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_DIMENSIONS:
        raise ValueError("no shape of samples")
    if not all(type(n) is int and n > 0 for n in value):
        raise ValueError("no shape of samples")
    if math.prod(value) > MAX_ELEMENTS:
        raise ValueError(f"samples of more than {MAX_ELEMENTS} elements")
    return tuple(value)


def classes_of(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CLASSES:
        raise ValueError(f"no list of up to {MAX_CLASSES} classes")
    if not all(type(name) is str for name in value):
        raise ValueError("classes whose names are no text")
    return tuple(value)


def samples_of(value: object) -> dict[str, int]:
    """Return the number of samples of each part of a client's data; "train" is not empty."""
    if not isinstance(value, dict) or value.keys() != set(PARTS):
        raise ValueError("no numbers of samples")
    if not all(map(is_count, value.values())):
        raise ValueError(f"numbers of samples that are not 0 to {MAX_COUNT - 1}")
    if not value["train"]:
        raise ValueError("no training samples")
    return value


def is_count(value: object) -> bool:
    """Return whether a value is a count: an int from 0 to ``MAX_COUNT - 1``."""
    return type(value) is int and 0 <= value < MAX_COUNT


def digest_of(value: object) -> str:
    if type(value) is not str or not _DIGEST.fullmatch(value):
        raise ValueError("no digest of data")
    return value


def texts_of(value: object) -> dict[str, str]:
    """Return a table of texts, such as a machine's fingerprint."""
    if not isinstance(value, dict) or not all(type(v) is str for v in value.values()):
        raise ValueError("no table of texts")
    return value


def by_client(value: object, one: Callable[[object], T]) -> dict[str, T]:
    """Return a table by client, each value checked by ``one``."""
    if not isinstance(value, dict) or not all(map(_CLIENT.fullmatch, value)):
        raise ValueError("no table of clients")
    return {client: one(what) for client, what in value.items()}


def count_of(value: object) -> int:
    if not is_count(value):
        raise ValueError("no number")
    assert isinstance(value, int)
    return value


def size_of(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("no number of bytes")
    return value


def _part_of(value: object) -> dict[str, Any]:
    """Return the shape and classes of a client's part of samples that it shares with others."""
    if not isinstance(value, dict) or not 0 < count_of(value.get("num_classes")) <= MAX_CLASSES:
        raise ValueError("no part of shared samples")
    shape = list(shape_of(value.get("input_shape")))
    return {"input_shape": shape, "num_classes": value["num_classes"]}


def data_of(value: object) -> dict[str, Any]:
    """Return a run's record of its clients' data."""
    if not isinstance(value, dict):
        raise ValueError("no record of the clients' data")
    weights = value.get("class_weights", [])
    if not isinstance(weights, list) or not all(
        type(w) in (int, float) and 0 <= w < math.inf for w in weights
    ):
        raise ValueError("no weights of classes")
    samples = by_client(value.get("num_samples"), samples_of)
    if not samples:
        raise ValueError("no clients")
    parts = {"parts": by_client(value["parts"], _part_of)} if "parts" in value else {}
    return {
        **parts,
        "input_shape": list(shape_of(value.get("input_shape"))),
        "classes": list(classes_of(value.get("classes"))),
        "class_weights": weights,
        "num_samples": samples,
        "digests": by_client(value.get("digests"), digest_of),
    }


def ranks_of(value: object) -> dict[str, int]:
    """Return of which of how many ranks a record is; without one, it is of a server in one."""
    if value is None:
        return {"rank": 0, "size": 1}
    if not isinstance(value, dict) or not all(is_count(value.get(n)) for n in ("rank", "size")):
        raise ValueError("no record of the server's ranks")
    if not value["rank"] < value["size"] <= MAX_RANKS:
        raise ValueError(f"rank {value['rank']} of {value['size']}")
    return {"rank": value["rank"], "size": value["size"]}


def about_of(value: object) -> dict[str, Any]:
    """Return the ``about`` of a checkpoint; a client's is empty. Unknown names are dropped."""
    if not isinstance(value, dict):
        raise ValueError("no record of what it is about")
    readers: Mapping[str, Callable[[object], Any]] = {
        "data": data_of,
        "fingerprint": texts_of,
        "clients": lambda table: by_client(table, texts_of),
        "own": lambda table: by_client(table, count_of),
    }
    return {name: readers[name](what) for name, what in value.items() if name in readers}
