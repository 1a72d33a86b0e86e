"""Templates of ``torch.save`` files, for pages: JavaScript fills in tensors without making pickles.

A template is a file that torch wrote, cut around what differs between files of these dtypes and
shapes: the tensors' data, their CRCs (twice each), and the file's id with its CRC. As
``sfl.files.torch_template``, whose knowledge of such files it uses, but for several tensors.
"""

import base64
import functools
import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any, Final

import torch

from experiments.web.pages import Answer, Route
from sfl.errors import ConfigError, RunError, quoted
from sfl.files.torch_file import TensorSpec, encode, encode_state, max_state_bytes
from sfl.files.torch_template import ID_DIGITS, content_at, crc_places, id_digits

DTYPES: Final = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
MOST_BYTES: Final = 16 * 2**20  # of the data of a template that a page asks for
MOST_DIMENSIONS: Final = 8
_ID, _PICKLE = ".data/serialization_id", "data.pkl"

Json = dict[str, Any]


def tensor_template(spec: TensorSpec) -> Json:
    """Return the template of a file with one tensor."""
    empty = torch.zeros(spec.shape, dtype=spec.dtype)
    return template({"": spec}, encode(empty))


def state_template(specs: Mapping[str, TensorSpec]) -> Json:
    """Return the template of a file with a dict of tensors."""
    empty = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    return template(specs, encode_state(empty))


def template(specs: Mapping[str, TensorSpec], file: bytes) -> Json:
    """Return the template of files like ``file``, which holds tensors of these specs.

    See ``Template`` in ``page/torchfile.js`` for its form.

    Raises:
        RunError: this release of torch writes such files in another layout.
    """
    try:
        return _template(specs, file)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(
            f"torch {torch.__version__} writes files of tensors in a layout that pages do not know:"
            " install a release that SFL was tested with"
        ) from error


def _template(specs: Mapping[str, TensorSpec], file: bytes) -> Json:
    """Return the template.

    Raises:
        ValueError, KeyError, BadZipFile: the file has another layout.
    """
    with zipfile.ZipFile(io.BytesIO(file)) as container:
        records = {r.filename.partition("/")[2]: r for r in container.infolist()}
        contents = {name: container.read(record) for name, record in records.items()}
        directory = container.start_dir
    if contents[_ID][ID_DIGITS:] != id_digits(r.CRC for n, r in records.items() if n != _ID):
        raise ValueError("another layout")
    id_start = content_at(file, records[_ID])
    holes: dict[int, tuple[int, Json]] = {}  # by offset: length, and what is filled in
    for index, spec in enumerate(specs.values()):
        record = records[f"data/{index}"]
        if record.file_size != spec.num_bytes:
            raise ValueError("another layout")
        holes[content_at(file, record)] = (spec.num_bytes, {"data": index})
        holes |= {at: (4, {"crc": index}) for at in crc_places(file, record, directory)}
    holes[id_start + ID_DIGITS] = (ID_DIGITS, {"id": True})
    holes |= {at: (4, {"id_crc": True}) for at in crc_places(file, records[_ID], directory)}
    return {
        "tensors": [_described(name, spec) for name, spec in specs.items()],
        "pieces": _pieces(file, holes),
        "crcs": [
            {"data": int(name[5:])} if name.startswith("data/") else record.CRC
            for name, record in records.items()
            if name != _ID
        ],
        "id": contents[_ID][:ID_DIGITS].decode(),
        "pickle": _base64(contents[_PICKLE]),
        "most": max_state_bytes(specs),
    }


def _described(name: str, spec: TensorSpec) -> Json:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(spec.shape), "bytes": spec.num_bytes}


def _pieces(file: bytes, holes: Mapping[int, tuple[int, Json]]) -> list[Any]:
    pieces: list[Any] = []
    end = 0
    for at, (length, what) in sorted(holes.items()):
        pieces += [_base64(file[end:at]), what]
        end = at + length
    return [*pieces, _base64(file[end:])]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def routes() -> dict[str, Route]:
    """Return the route by which a page gets the template of one tensor."""
    return {"/template": _answer}


def _answer(query: Mapping[str, str]) -> Answer:
    spec = parse_spec(query.get("dtype", "float32"), query.get("shape", ""))
    return Answer("application/json", json.dumps(_kept(spec)).encode(), max_age_s=3600)


@functools.lru_cache(maxsize=64)
def _kept(spec: TensorSpec) -> Json:
    return tensor_template(spec)


def parse_spec(dtype: str, shape: str) -> TensorSpec:
    """Return the spec of a tensor that a page asks for.

    Raises:
        ConfigError: it is none, or has more than ``MOST_BYTES``.
    """
    sizes = shape.split(",")
    fine = len(sizes) <= MOST_DIMENSIONS and all(
        s.isascii() and s.isdigit() and len(s) <= 9 and int(s) for s in sizes
    )
    if dtype not in DTYPES or not fine:
        raise ConfigError(
            f"/template?dtype={quoted(dtype, 20)}&shape={quoted(shape, 80)}: give one of"
            f" {', '.join(DTYPES)}, and a shape of up to {MOST_DIMENSIONS} sizes as 32,128"
        )
    spec = TensorSpec(tuple(map(int, sizes)), DTYPES[dtype])
    if math.prod(spec.shape) * spec.dtype.itemsize > MOST_BYTES:
        raise ConfigError(f"/template: {list(spec.shape)} {dtype} is more than {MOST_BYTES} bytes")
    return spec
