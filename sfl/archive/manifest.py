"""Manifests: one line per file, with the file's checksum and the line's own."""

import contextlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from sfl.archive.layout import MANIFEST
from sfl.errors import IntegrityError, quoted
from sfl.files import strict_json
from sfl.files.checksum import checksum
from sfl.files.regular_files import read_plain

DROPPED = "dropped"  # entry kind: a manifest or model that was removed, as the options ask
ROUND_LOG = "round_log"  # entry kind: a round is done
MAX_LINE_BYTES = 2**20  # of a manifest: a round log's entry lists the round's clients
_INSIDE = re.compile(r"[A-Za-z0-9._-][A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest: a file's kind, path and checksum."""

    kind: str
    path: str  # relative to the manifest's folder
    bytes: int
    checksum: str
    client: int = -1
    round: int = -1
    step: int = -1
    link: int = 0  # index of the cut
    order: int = -1  # number of steps that its back had taken before in this round
    offset: int = 0
    shape: tuple[int, ...] = ()  # for weight_grads: shape of the batch's labels, (B,)
    dtype: str = ""
    clients: tuple[int, ...] = ()  # for a round's log: the round's clients, in its order


def read_checked(path: Path, entry: Entry) -> bytes:
    """Return the bytes of a recorded file.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    try:
        data = read_plain(path, entry.offset, entry.bytes)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from error
    if len(data) != entry.bytes or checksum(data) != entry.checksum:
        raise IntegrityError(f"{path}: is damaged: its checksum differs from the manifest's")
    return data


def read_manifest(folder: Path) -> list[Entry]:
    """Return the entries of a folder's manifest.

    Raises:
        IntegrityError: it is damaged.
    """
    path = folder / MANIFEST
    try:
        *lines, rest = read_plain(path).split(b"\n")
        entries = [_parse_line(line) for line in lines]
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error
    # An incomplete last line was being written when the run was killed; it does not count.
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        _parse_line(rest[:-1])
        raise IntegrityError(f"{path}: is damaged: its last line does not end")
    return entries


def check_inside(path: str) -> None:
    """Check that a path in a record stays inside the record's folder.

    Raises:
        ValueError: it does not.
    """
    if not _INSIDE.fullmatch(path) or ".." in path.split("/"):
        raise ValueError(f"a path outside the folder: {quoted(path)}")


def manifest_line(entry: Entry) -> str:
    """Return an entry's line of a manifest.

    Its last field, ``check``, is the checksum of the line that ``json.dumps`` writes without it.
    """
    line = json.dumps({field.name: getattr(entry, field.name) for field in fields(entry)})
    check = json.dumps(checksum(line.encode()))
    return f'{line[:-1]}, "check": {check}}}'


def _parse_line(line: bytes) -> Entry:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes")
    values = strict_json.loads(line)
    values.pop("check", None)
    tuples = {name: tuple(values[name]) for name in ("shape", "clients")}
    entry = Entry(**values | tuples)
    # A manifest may come from another machine: trust no type or range.
    texts = entry.kind, entry.path, entry.checksum, entry.dtype
    counts = entry.bytes, entry.offset
    indices = entry.client, entry.round, entry.step, entry.link, entry.order
    numbers = *counts, *indices, *entry.shape, *entry.clients
    if {type(text) for text in texts} != {str} or {type(n) for n in numbers} != {int}:
        raise ValueError("a field is of another type")
    if manifest_line(entry).encode() != line:
        raise ValueError("a line is not what was written")
    if min(counts) < 0 or max(counts) >= 2**63 or min(numbers) < -1 or max(indices) >= 2**31:
        raise ValueError("a number is out of range")
    check_inside(entry.path)
    return entry
