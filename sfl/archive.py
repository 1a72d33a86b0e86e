"""The recorded tensors, read back: the one public reader of a run's folder.

::

    for step in sfl.archive.open("shared_files/server/my-run").steps(client=0, round=3):
        step.labels, step.activations, step.grads

Each folder of tensors has a ``manifest.jsonl``, its only index: one line a file, written when the
file lies there whole. The run's own ``manifest.jsonl`` lists models, logs and finished manifests.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfl import strict_json
from sfl.errors import IntegrityError, RunError, quoted
from sfl.plain_file import check_linkless, read_plain
from sfl.protocol import checksum
from sfl.tensors import StateSpec, TensorSpec, decode, decode_state

MANIFEST = "manifest.jsonl"
DROPPED = "dropped"  # kind of the entry for a manifest, or a model, that was not to stay
MODELS = "models/"  # where a run's weights lie
ROUND_LOG = "round_log"  # kind of the entry that says that a round is done
LABELS, ACTIVATIONS, GRADS = "labels", "split_layer_tensor", "grads"
WEIGHT_GRADS = "weight_grads"
TENSOR_KINDS = (LABELS, ACTIVATIONS, GRADS)  # of a step over a cut; else it has WEIGHT_GRADS alone

MAX_TABLE_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**20  # of a manifest: a round's log names those who took part
_INSIDE = re.compile(r"[A-Za-z0-9._-][A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest: what a file is, where it lies, and its checksum."""

    kind: str
    path: str  # relative to the manifest's folder
    bytes: int
    checksum: str
    client: int = -1
    round: int = -1
    step: int = -1
    link: int = 0  # which cut
    order: int = -1  # how many steps its back had taken before in this round
    offset: int = 0
    shape: tuple[int, ...] = ()  # of weight_grads: that of the labels they come from, (B,)
    dtype: str = ""
    clients: tuple[int, ...] = ()  # of a round's log: who took part, in the round's order


@functools.lru_cache(maxsize=1024)  # two for each step
def client_folder(root: Path, client: int, round_index: int) -> Path:
    """Return where a client's tensors of a round lie."""
    return root / "client_files" / f"client_{client}" / f"round_{round_index:03d}"


def round_of_folder(folder: Path) -> tuple[int, int] | None:
    """Return the client and the round whose tensors lie in a folder; None if none do."""
    place = re.fullmatch(r"client_(\d+)/round_(\d+)", "/".join(folder.parts[-2:]))
    return (int(place[1]), int(place[2])) if place else None


@dataclass(frozen=True)
class Step:
    """One recorded step of a client; the tensors are read, and checked, when asked for."""

    client: int
    round: int
    step: int
    order: int  # how many steps its back had taken before in this round
    folder: Path
    entries: Mapping[str, Entry] = field(repr=False)

    def path(self, kind: str) -> Path:
        return self.folder / self.entries[kind].path

    def _read(self, kind: str) -> Tensor:
        entry, path = self.entries[kind], self.path(kind)
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise IntegrityError(
                f"{self.folder / MANIFEST}: names no dtype {quoted(entry.dtype, 40)}"
            )
        data = read_checked(path, entry)
        return decode(data, TensorSpec(tuple(entry.shape), dtype), str(path))

    @property
    def labels(self) -> Tensor:
        """(B,) int64."""
        return self._read(LABELS)

    @property
    def activations(self) -> Tensor:
        """(B, *cut) float32: the smashed data that the client sent."""
        return self._read(ACTIVATIONS)

    @property
    def grads(self) -> Tensor:
        """(B, *cut) float32: the loss's gradient at the cut, as the server sent it."""
        return self._read(GRADS)

    def weight_grads(self, spec: StateSpec) -> dict[str, Tensor]:
        """Return the gradients of the whole model that the client sent, by parameter."""
        path = self.path(WEIGHT_GRADS)
        return decode_state(read_checked(path, self.entries[WEIGHT_GRADS]), spec, str(path))

    @property
    def num_samples(self) -> int:
        """How many samples its batch had."""
        return next(iter(self.entries.values())).shape[0]


def read_checked(path: Path, entry: Entry) -> bytes:
    """Return the bytes of a recorded file.

    Raises:
        IntegrityError: it is missing, or its bytes are not those that were written.
    """
    try:
        data = read_plain(path, entry.offset, entry.bytes)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from error
    if len(data) != entry.bytes or checksum(data) != entry.checksum:
        raise IntegrityError(f"{path}: is damaged: its checksum differs from the manifest's")
    return data


class RunArchive:
    """A recorded run, as it lies on disk.

    Raises (from any method):
        IntegrityError: a file that the run's manifests list is damaged or missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / MANIFEST).is_file():
            raise RunError(f"{root} is no folder of a run: it has no {MANIFEST}")
        newest = {entry.path: entry for entry in read_manifest(root)}
        self._listed = {p: entry for p, entry in newest.items() if entry.kind != DROPPED}
        self._dropped = newest.keys() - self._listed.keys()
        self.rounds_without_models = frozenset(  # those that were not to stay
            newest[p].round for p in self._dropped if p.startswith(MODELS)
        )

    @property
    def listed(self) -> list[Entry]:
        """Everything that the run's own manifest lists: models, logs, finished manifests."""
        return list(self._listed.values())

    def lists(self, path: str) -> bool:
        """Say whether the run's own manifest lists a file."""
        return path in self._listed

    def has_listed(self, path: str) -> bool:
        """Say whether it lists a file, or did until that was not to stay any more."""
        return path in self._listed or path in self._dropped

    def read(self, path: str) -> bytes:
        """Return the checked bytes of a listed file, by its path in the run's folder."""
        if path not in self._listed:
            raise IntegrityError(f"{self.root / path}: is not in the run's manifest")
        return read_checked(self.root / path, self._listed[path])

    def state(self, path: str, spec: StateSpec) -> dict[str, Tensor]:
        """Return the weights in a listed file."""
        return decode_state(self.read(path), spec, str(self.root / path))

    def config(self) -> dict[str, Any]:
        """Return every option of the run."""
        return self._table("config.json")

    def environment(self) -> dict[str, Any]:
        """Return what the run ran on: versions, threads, devices."""
        return self._table("environment.json")

    def _table(self, path: str) -> dict[str, Any]:
        try:
            values = strict_json.loads(self.read(path)[:MAX_TABLE_BYTES])
        except ValueError as error:
            raise IntegrityError(f"{self.root / path}: is damaged: {error}") from error
        if not isinstance(values, dict):
            raise IntegrityError(f"{self.root / path}: is no table")
        return values

    def folders(self, client: int | None = None, round: int | None = None) -> list[Path]:
        """Return the folders of recorded tensors, by round and client.

        Those that the run's manifest lists, whether they are there or not, and those of a round
        that did not end.
        """
        listed = {self.root / e.path for e in self.listed if e.kind == "manifest"}
        lying = set(self.root.glob(f"client_files/client_*/round_*/{MANIFEST}"))
        found = []
        for folder in {path.parent for path in listed | lying}:
            place = round_of_folder(folder)
            if place and client in (None, place[0]) and round in (None, place[1]):
                found.append((place[1], place[0], folder))
        return [folder for _, _, folder in sorted(found)]

    def rounds(self, client: int | None = None) -> list[int]:
        """Return the rounds of which tensors are recorded."""
        return sorted({int(folder.name[len("round_") :]) for folder in self.folders(client)})

    def steps(self, client: int | None = None, round: int | None = None) -> Iterator[Step]:
        """Yield the recorded steps, of one client or round if asked for, in order of processing."""
        by_round: dict[str, list[Step]] = {}
        for folder in self.folders(client, round):
            by_round.setdefault(folder.name, []).extend(self._steps_in(folder))
        for steps in by_round.values():
            yield from sorted(steps, key=lambda step: (step.order, step.client))

    def _steps_in(self, folder: Path) -> list[Step]:
        name = (folder / MANIFEST).relative_to(self.root).as_posix()
        if name in self._listed:  # of a round that was finished
            self.read(name)
        files: dict[int, dict[str, Entry]] = {}
        for entry in read_manifest(folder):
            files.setdefault(entry.step, {})[entry.kind] = entry
        steps = []
        for step, entries in sorted(files.items()):
            # The last step of a run that was killed may lack a file; it has not counted.
            if entries.keys() in (set(TENSOR_KINDS), {WEIGHT_GRADS}):
                first = next(iter(entries.values()))
                steps.append(Step(first.client, first.round, step, first.order, folder, entries))
        return steps


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
    # What has no end of line was being written when the run was killed; it has not counted.
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        _parse_line(rest[:-1])
        raise IntegrityError(f"{path}: is damaged: its last line does not end")
    return entries


def check_inside(path: str) -> None:
    """See that a file named by a record lies inside the record's own folder.

    Raises:
        ValueError: it does not.
    """
    if not _INSIDE.fullmatch(path) or ".." in path.split("/"):
        raise ValueError(f"a path outside the folder: {quoted(path)}")


def manifest_line(entry: Entry) -> str:
    """Return an entry as its line of a manifest, which ends in the line's own checksum.

    That is of the line as ``json.dumps`` writes it without ``check``.
    """
    fields = asdict(entry)
    check = checksum(json.dumps(fields).encode())
    return json.dumps(fields | {"check": check})


def _parse_line(line: bytes) -> Entry:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes")
    values = strict_json.loads(line)
    values.pop("check", None)
    tuples = {name: tuple(values[name]) for name in ("shape", "clients")}
    entry = Entry(**values | tuples)
    # A manifest may come from somebody else.
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


def open(path: str | os.PathLike[str]) -> RunArchive:
    """Open a recorded run by its folder.

    Raises:
        RunError: the folder is none of a run, or there is a link in it.
        IntegrityError: its manifest is damaged.
    """
    root = Path(path)
    try:
        check_linkless(root)
    except OSError as error:
        raise RunError(f"cannot read {root}: {error.filename}: {error.strerror}") from error
    return RunArchive(root)
