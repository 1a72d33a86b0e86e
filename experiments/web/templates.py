"""Templates of ``torch.save`` files, for pages: JavaScript fills in tensors without making pickles.

A template is a file that torch wrote, cut around what differs between files of these dtypes and
shapes: the tensors' data, their CRCs (twice each), and the file's id with its CRC. As
``sfl.files.torch_template``, which has one tensor and reads as well, for several.
"""

import base64
import functools
import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, Final

import torch

from experiments.web.pages import Answer, Route
from sfl.errors import ConfigError, quoted
from sfl.files.torch_file import TensorSpec, encode, encode_state, max_state_bytes

DTYPES: Final = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
MOST_BYTES: Final = 16 * 2**20  # of the data of a template that a page asks for
MOST_DIMENSIONS: Final = 8
_ID, _PICKLE, _ID_DIGITS = ".data/serialization_id", "data.pkl", 20
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")  # of a zip's directory, 46 bytes

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
    """
    with zipfile.ZipFile(io.BytesIO(file)) as container:
        records = {r.filename.partition("/")[2]: r for r in container.infolist()}
        contents = {name: container.read(record) for name, record in records.items()}
        directory = container.start_dir
    crc_places = _crc_places(file, records, directory)
    id_start = _content_at(file, records[_ID])
    holes: dict[int, tuple[int, Json]] = {}  # by offset: length, and what is filled in
    for index, spec in enumerate(specs.values()):
        record = records[f"data/{index}"]
        holes[_content_at(file, record)] = (spec.num_bytes, {"data": index})
        holes |= {at: (4, {"crc": index}) for at in crc_places[f"data/{index}"]}
    holes[id_start + _ID_DIGITS] = (_ID_DIGITS, {"id": True})
    holes |= {at: (4, {"id_crc": True}) for at in crc_places[_ID]}
    return {
        "tensors": [_described(name, spec) for name, spec in specs.items()],
        "pieces": _pieces(file, holes),
        "crcs": [
            {"data": int(name[5:])} if name.startswith("data/") else record.CRC
            for name, record in records.items()
            if name != _ID
        ],
        "id": contents[_ID][:_ID_DIGITS].decode(),
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


def _content_at(file: bytes, record: zipfile.ZipInfo) -> int:
    """Return the offset of a record's content: after its header, name and extra fields."""
    name, extra = struct.unpack_from("<HH", file, record.header_offset + 26)
    return int(record.header_offset + 30 + name + extra)


def _crc_places(
    file: bytes, records: Mapping[str, zipfile.ZipInfo], directory: int
) -> dict[str, tuple[int, int]]:
    """Return the offsets of each record's CRC: after its content, and in the directory."""
    places, entry = {}, directory
    for name, record in records.items():
        after = _content_at(file, record) + record.file_size + 4  # skip the signature
        places[name] = after, entry + 16
        lengths = _ENTRY.unpack_from(file, entry)[10:13]
        entry += _ENTRY.size + sum(lengths)
    return places


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
