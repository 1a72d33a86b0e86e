"""Files that a sender of bad will could make: each must end in the project's own error."""

import functools
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping

import torch

from sfl.files.torch_file import encode

# By what is wrong with it: a file, and a pattern of the answer to it.
Files = dict[str, tuple[bytes, str]]
Z = torch.arange(12, dtype=torch.float32).reshape(3, 4)


class RunsCode:
    """What a file asks to have done when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('the file ran code')",))


class Subclass(torch.Tensor):
    pass


def saved(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def changed(
    records: Mapping[str, bytes], data: bytes = b"", compression: int = zipfile.ZIP_STORED
) -> bytes:
    """Return a file with some records replaced, added or, if they are empty, left out."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data or encode(Z))) as source,
        zipfile.ZipFile(stream, "w", compression) as target,
    ):
        found = {r.filename.removeprefix("archive/"): source.read(r) for r in source.infolist()}
        for name, content in (found | dict(records)).items():
            if content or name not in records:
                target.writestr(f"archive/{name}", content)
    return stream.getvalue()


def pickled(replace: bytes, by: bytes) -> bytes:
    """Return the file of ``Z`` with something else in its pickle."""
    with zipfile.ZipFile(io.BytesIO(encode(Z))) as source:
        content = source.read("archive/data.pkl")
    assert replace in content
    return changed({"data.pkl": content.replace(replace, by)})


def patched(offset: int, by: bytes, *, in_directory: bool = False) -> bytes:
    """Return the file of ``Z`` with other bytes at an offset in a head of its storage's record.

    The local head, or the one in the container's directory.
    """
    data = bytearray(encode(Z))
    name = data.rindex(b"archive/data/0") if in_directory else data.index(b"archive/data/0")
    start = name - (46 if in_directory else 30) + offset
    data[start : start + len(by)] = by
    return bytes(data)


def _doubled() -> bytes:
    stream = io.BytesIO(encode(Z))
    data = stream.getvalue()
    # A second entry of the same name in the directory, as zipfile would refuse to write it.
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x06\x06")
    first = data[start : data.index(b"PK\x01\x02", start + 4)]
    directory = data[start:end] + first
    count = data[start:end].count(b"PK\x01\x02") + 1
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    return data[:start] + directory + tail


def _flipped() -> bytes:
    data = bytearray(encode(Z))
    data[data.index(Z.numpy().tobytes()) + 5] ^= 1
    return bytes(data)


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will do without them one day
        return torch.quantize_per_tensor(Z, 0.1, 0, torch.quint8)


def _in_front(*, moved: bool) -> bytes:
    """Return a file with a pickle before it; its offsets count the pickle's bytes or do not."""
    if not moved:
        return EVIL + encode(Z)
    stream = io.BytesIO(EVIL)
    with zipfile.ZipFile(io.BytesIO(encode(Z))) as source, zipfile.ZipFile(stream, "a") as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return stream.getvalue()


def _rewritten(
    folder: str = "archive", *, gap_before: str = "", comment: bytes = b"", extra: bytes = b""
) -> bytes:
    """Return the file of ``Z`` with its records in a folder, and bytes where none belong."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(encode(Z))) as source, zipfile.ZipFile(stream, "w") as target:
        for record in source.infolist():
            inner = record.filename.removeprefix("archive/")
            if inner == gap_before:
                stream.write(EVIL)
                target.start_dir = stream.tell()
            info = zipfile.ZipInfo(f"{folder}/{inner}")
            info.comment, info.extra = comment, extra
            target.writestr(info, source.read(record))
        if gap_before == "directory":
            stream.write(EVIL)
            target.start_dir = stream.tell()
    return stream.getvalue()


def _in_the_padding() -> bytes:
    data = encode(Z)
    start = data.index(b"ZZZZ", data.index(b"archive/data/0"))
    return data[:start] + EVIL[:32] + data[start + 32 :]


def _two_folders() -> bytes:
    data = encode(Z)
    return data.replace(b"archive/version", b"brchive/version")


EVIL = pickle.dumps(RunsCode(), 2)  # what no file may have anywhere
# {((((..., ...), ...), 1): its hash takes 2^60 steps.
_NESTED_KEY = (
    b"\x80\x02}(K\x01" + b"".join(bytes([*b"q", n, *b"h", n, 0x86]) for n in range(60)) + b"K\x01u."
)


def _containers() -> Files:
    """Return what is no whole container of the right records."""
    return {
        "nothing": (b"", "no whole"),
        "text": (b"GET / HTTP/1.1\r\n\r\n", "no whole"),
        "half a file": (encode(Z)[: len(encode(Z)) // 2], "no whole"),
        "a byte too few": (encode(Z)[:-1], "no whole"),
        "a plain pickle that runs code": (pickle.dumps(RunsCode()), "no whole"),
        "a pickle that runs code": (saved(RunsCode()), "asks for __builtin__ exec"),
        "a legacy file": (saved(Z, _use_new_zipfile_serialization=False), "no whole"),
        "a pickle that allocates 3 GiB": (
            changed({"data.pkl": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\xc0\0\x85R."}),
            "asks for",
        ),
        "nested tuples as a key": (changed({"data.pkl": _NESTED_KEY}), "more than tensors"),
        "a file that declares 10 GiB": (
            pickled(b"K\x0ct", b"\x8a\x05" + (10 * 2**30 // 4).to_bytes(5, "little") + b"t"),
            "view",
        ),
        "a deflate bomb": (
            changed({"data/0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED),
            "compressed",
        ),
        "a deflated file": (changed({}, compression=zipfile.ZIP_DEFLATED), "compressed"),
        "a record twice": (_doubled(), "two records"),
        "a record of a strange name": (changed({"code/evil.py": b"1"}), "no tensor's"),
        "a record outside": (changed({"../../evil": b"1"}), "no tensor's"),
        "a storage that no tensor has": (changed({"data/1": b"1"}), "no tensor has"),
        "a storage too small": (changed({"data/0": b"1234"}), "declares a storage"),
        "a storage too large": (changed({"data/0": bytes(49)}), "declares a storage"),
        "no storage": (changed({"data/0": b""}), "declares a storage"),
        "a pickle of a thousand dicts": (
            changed({"data.pkl": b"\x80\x02" + b"}" * 2000 + b"."}),
            "larger than its tensors need",
        ),
        "thirty records too many": (changed({f"x{n}": b"1" for n in range(30)}), "more records"),
        "no pickle": (changed({"data.pkl": b""}), "no pickle"),
        "another byte order": (changed({"byteorder": b"big"}), "byteorder"),
        "an encrypted record": (patched(8, b"\x01", in_directory=True), "no whole"),
        "a flipped bit in the data": (_flipped(), "no whole"),
        "another checksum": (patched(16, b"\0\0\0\0", in_directory=True), "no whole"),
    }


def _hidden_bytes() -> Files:
    """Return files with bytes where torch writes none, in the container and in the pickle."""
    return {
        "a pickle in front": (_in_front(moved=False), "bytes before"),
        "a pickle in front that the offsets count": (_in_front(moved=True), "bytes before"),
        "a pickle between two records": (_rewritten(gap_before="version"), "bytes around"),
        "a pickle before the directory": (_rewritten(gap_before="directory"), "bytes around"),
        "a pickle behind the end": (encode(Z) + EVIL, "no whole"),
        "a pickle as a comment": (_rewritten(comment=EVIL), "bytes beside"),
        "a pickle as an attribute": (_rewritten(extra=b"XX\x08\0 a pickl"), "bytes around"),
        "a pickle as padding": (_in_the_padding(), "bytes around"),
        "a pickle behind the pickle": (pickled(b"q\x0b.", b"q\x0b." + EVIL), "bytes behind"),
        "PROTO 255": (pickled(b"\x80\x02", b"\x80\xff"), "protocol 255"),
        "PROTO 4": (pickled(b"\x80\x02", b"\x80\x04"), "protocol 4"),
        "PROTO twice": (pickled(b"\x80\x02", b"\x80\x02\x80\x02"), "begins as none"),
        "no PROTO": (pickled(b"\x80\x02", b""), "begins as none"),
        "a memo of 2^31": (pickled(b"q\x01", b"r\0\0\0\x80"), "puts 2147483648"),
        "a memo that is overwritten": (pickled(b"q\x01", b"q\x00"), "puts 0 where 1"),
        "a memo that was never put": (pickled(b"\x89", b"h\x40"), "gets 64"),
        "a mark that is left": (pickled(b"\x80\x02", b"\x80\x02("), "no plain dense tensor"),
        "a folder ..": (_rewritten(".."), "no tensor's"),
        "a folder .": (_rewritten("."), "no tensor's"),
        "a folder in a folder": (_rewritten("a/b"), "no tensor's"),
        "two folders": (_two_folders(), "more than one folder"),
    }


def _other_contents() -> Files:
    """Return files of something else than the tensor that is expected."""
    return {
        "stride 0": (pickled(b"K\x04K\x01\x86", b"K\x00K\x00\x86"), "view"),
        "a view larger than its storage": (pickled(b"K\x03K\x04\x86", b"K\x7fK\x04\x86"), "view"),
        "an offset": (pickled(b"QK\x00K\x03", b"QK\x01K\x03"), "owns its storage"),
        "a negative size": (pickled(b"K\x03K\x04\x86", b"J\xff\xff\xff\xffK\x04\x86"), "no sizes"),
        "40 dimensions": (pickled(b"K\x03K\x04\x86", b"(" + b"K\x01" * 40 + b"t"), "dimensions"),
        "a tensor on another device": (
            pickled(b"X\x03\0\0\0cpu", b"X\x04\0\0\0cuda"),
            "never travels",
        ),
        "a tensor that asks for gradients": (pickled(b"\x89", b"\x88"), "asks for NEWTRUE"),
        "a view": (saved(Z[1:2]), "owns its storage|view"),
        "an expanded tensor": (saved(Z[0, :1].expand(3, 4)), "view"),
        "a transposed tensor": (saved(Z.t()), "view"),
        "a list": (saved([Z]), "asks for EMPTY_LIST"),
        "a dict": (saved({"z": Z}), "several by their names"),
        "a number": (saved(3), "no plain dense tensor"),
        "a sparse tensor": (saved(Z.to_sparse()), "asks for"),
        "a quantised tensor": (
            saved(_quantized()),
            "asks for",
        ),
        "a meta tensor": (saved(torch.empty(3, 4, device="meta")), "asks for"),
        "a complex tensor": (saved(Z * 1j), "asks for"),
        "a negative-bit tensor": (saved(torch._neg_view(Z)), "asks for|owns"),
        "a parameter": (saved(torch.nn.Parameter(Z)), "asks for"),
        "a tensor subclass": (saved(Z.as_subclass(Subclass)), "asks for"),
        "another dtype": (saved(Z.double()), "float64"),
        "another shape": (saved(Z[:2].clone()), r"\[2, 4\]"),
    }


@functools.cache
def hostile_files() -> Files:
    """Return the files of a bad sender; each stands where ``Z`` is expected."""
    return _containers() | _hidden_bytes() | _other_contents()
