"""Reading a recorded run: the public interface to a run's folder.

::

    for step in sfl.archive.open("shared_files/server/my-run").steps(client=0, round=3):
        step.labels, step.activations, step.grads

Each folder of tensors has a ``manifest.jsonl``, its only index: one line per file, written when the
file is complete. The run's own ``manifest.jsonl`` lists models, logs and finished manifests.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfl.archive.layout import (
    ACTIVATIONS,
    GRADS,
    LABELS,
    MANIFEST,
    MODELS,
    STATUS,
    WEIGHT_GRADS,
    WITH_LINKS,
    round_of_folder,
    shares_in,
)
from sfl.archive.manifest import DROPPED, ROUND_LOG, Entry, read_checked, read_manifest
from sfl.errors import IntegrityError, RunError, quoted
from sfl.files import strict_json
from sfl.files.regular_files import check_linkless
from sfl.files.torch_file import StateSpec, TensorSpec, decode, decode_state

MAX_TABLE_BYTES = 64 * 2**20
WRITTEN_WITHIN_S = 0.1  # in which a file that was replaced is listed anew


@dataclass(frozen=True)
class Step:
    """A client's step at one cut; its tensors are read and verified on access.

    Raises (from any method):
        IntegrityError: a tensor is damaged, missing, or not recorded at this cut.
    """

    client: int
    round: int
    step: int
    link: int  # index of the cut; 0 is the first
    order: int  # number of steps that its back had taken before in this round
    folder: Path
    entries: Mapping[str, Entry] = field(repr=False)

    def entry(self, kind: str) -> Entry:
        """Return the manifest's entry of one of its tensors."""
        if kind not in self.entries:
            where = f"{self.folder}: step {self.step}, cut {self.link}"
            raise IntegrityError(f"{where}: has no {kind} recorded")
        return self.entries[kind]

    def path(self, kind: str) -> Path:
        """Return the path of one of its tensors."""
        return self.folder / self.entry(kind).path

    def tensor(self, kind: str) -> Tensor:
        """Return one of its tensors, by its kind (``sfl.archive.layout``)."""
        entry, path = self.entry(kind), self.path(kind)
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise IntegrityError(
                f"{self.folder / MANIFEST}: names no dtype {quoted(entry.dtype, 40)}"
            )
        data = read_checked(path, entry)
        return decode(data, TensorSpec(tuple(entry.shape), dtype), str(path))

    @property
    def labels(self) -> Tensor:
        """(B,) int64; of the first cut that is recorded here, and only if labels are sent."""
        return self.tensor(LABELS)

    @property
    def activations(self) -> Tensor:
        """(B, *cut) float32: the smashed data that crossed this cut."""
        return self.tensor(ACTIVATIONS)

    @property
    def grads(self) -> Tensor:
        """(B, *cut) float32: the gradient of the loss at this cut."""
        return self.tensor(GRADS)

    def weight_grads(self, spec: StateSpec) -> dict[str, Tensor]:
        """Return the gradients of all parameters that the client sent, by name."""
        path = self.path(WEIGHT_GRADS)
        return decode_state(read_checked(path, self.entry(WEIGHT_GRADS)), spec, str(path))

    @property
    def num_samples(self) -> int:
        """Number of samples in its batch."""
        return next(iter(self.entries.values())).shape[0]


NOT_A_SERVERS = "give the folder of a server's run, as shared_files/server/<run>"


class RunArchive:
    """A recorded run on disk, with the shares of other ranks that lie in its folder.

    A file that several shares have, such as a merged model, is read from the run's own.

    Raises (from any method):
        IntegrityError: a file that the run's manifests list is damaged or missing.
        RunError: the run goes on, and has removed the file since.
    """

    def __init__(self, root: Path, *, is_share: bool = False) -> None:
        self.root = root
        if not (root / MANIFEST).is_file():
            raise RunError(f"{root} is no folder of a run: it has no {MANIFEST}")
        newest = {entry.path: entry for entry in read_manifest(root)}
        self._listed = {p: entry for p, entry in newest.items() if entry.kind != DROPPED}
        self._dropped = newest.keys() - self._listed.keys()
        shares = [] if is_share else shares_in(root)
        there = [path for path in shares if (path / MANIFEST).is_file()]
        self.shares = [RunArchive(path, is_share=True) for path in there]
        self.rounds_without_models = frozenset(  # removed, as --keep-models asks
            newest[p].round for p in self._dropped if p.startswith(MODELS)
        )

    @property
    def listed(self) -> list[Entry]:
        """The entries of the run's own manifest: models, logs, finished manifests."""
        return list(self._listed.values())

    def lists(self, path: str) -> bool:
        """Return whether the run's own manifest, or a share's, lists a file."""
        return path in self._listed or any(share.lists(path) for share in self.shares)

    def was_listed(self, path: str) -> bool:
        """Return whether the manifest lists a file, or did before the file was removed."""
        return path in self._listed or path in self._dropped

    @property
    def last_round(self) -> int:
        """The last round that was completed; -1: none."""
        return max((e.round for e in self.listed if e.kind == ROUND_LOG), default=-1)

    def read(self, path: str) -> bytes:
        """Return the bytes of a listed file, verified, by its path in the run's folder."""
        if path not in self._listed:
            for share in self.shares:
                if share.lists(path):
                    return share.read(path)
            raise IntegrityError(f"{self.root / path}: is not in the run's manifest")
        try:
            return read_checked(self.root / path, self._listed[path])
        except IntegrityError:
            if (self.root / STATUS).exists():  # the run goes on
                time.sleep(WRITTEN_WITHIN_S)
            if not self._was_changed(path):
                raise
        return read_checked(self.root / path, self._listed[path])

    def _was_changed(self, path: str) -> bool:
        """Note what a run that goes on has done with a file since its manifest was read.

        Raises:
            RunError: the run has removed it.
        """
        newest = {entry.path: entry for entry in read_manifest(self.root)}.get(path)
        if newest is None or newest == self._listed[path]:
            return False
        if newest.kind == DROPPED:
            raise RunError(
                f"{self.root / path} was removed while it was to be read: the run goes on, and does"
                " not keep it"
            )
        self._listed[path] = newest
        return True

    def state(self, path: str, spec: StateSpec) -> dict[str, Tensor]:
        """Return the weights in a listed file."""
        return decode_state(self.read(path), spec, str(self.root / path))

    def config(self) -> dict[str, Any]:
        """Return every option of the run."""
        return self._table("config.json")

    def environment(self) -> dict[str, Any]:
        """Return the run's environment: versions, threads, devices."""
        return self._table("environment.json")

    def _table(self, path: str) -> dict[str, Any]:
        if not self.lists(path):
            raise RunError(f"{self.root} has no {path}: {NOT_A_SERVERS}")
        try:
            values = strict_json.loads(self.read(path)[:MAX_TABLE_BYTES])
        except ValueError as error:
            raise IntegrityError(f"{self.root / path}: is damaged: {error}") from error
        if not isinstance(values, dict):
            raise IntegrityError(f"{self.root / path}: is no table")
        return values

    def folders(self, client: int | None = None, round: int | None = None) -> list[Path]:
        """Return the folders of recorded tensors, sorted by round and client.

        These are the folders that the run's manifest lists, present or not, and those of an
        unfinished round.
        """
        listed = {self.root / e.path for e in self.listed if e.kind == "manifest"}
        present = set(self.root.glob(f"client_files/client_*/round_*/{MANIFEST}"))
        folders = {path.parent for path in listed | present}
        folders |= {folder for share in self.shares for folder in share.folders(client, round)}
        found = []
        for folder in folders:
            place = round_of_folder(folder)
            if place and client in (None, place[0]) and round in (None, place[1]):
                found.append((place[1], place[0], folder))
        return [folder for _, _, folder in sorted(found)]

    def rounds(self, client: int | None = None) -> list[int]:
        """Return the rounds with recorded tensors."""
        return sorted({int(folder.name[len("round_") :]) for folder in self.folders(client)})

    def steps(self, client: int | None = None, round: int | None = None) -> Iterator[Step]:
        """Yield the recorded steps in order of processing, of one client or round if given.

        With several cuts, each step comes once per cut, in their order.
        """
        by_round: dict[str, list[Step]] = {}
        for folder in self.folders(client, round):
            whose = next(own for own in (self, *self.shares) if folder.parents[2] == own.root)
            by_round.setdefault(folder.name, []).extend(whose._steps_in(folder))
        for steps in by_round.values():
            yield from sorted(steps, key=lambda step: (step.order, step.client, step.link))

    def _steps_in(self, folder: Path) -> list[Step]:
        name = (folder / MANIFEST).relative_to(self.root).as_posix()
        if name in self._listed:  # its round was finished
            self.read(name)
        files: dict[tuple[int, int], dict[str, Entry]] = {}
        labels: dict[
            int, Entry
        ] = {}  # they travel at the model's first cut, which may lie elsewhere
        for entry in read_manifest(folder):
            if entry.kind == LABELS:
                labels[entry.step] = entry
            else:
                files.setdefault((entry.step, entry.link), {})[entry.kind] = entry
        steps = []
        for (step, link), entries in sorted(files.items()):
            # Gradients are listed last: a step without them was interrupted and does not count.
            if last := entries.get(GRADS) or entries.get(WEIGHT_GRADS):
                of_step = {LABELS: labels.pop(step)} if step in labels else {}
                entries = of_step | entries
                steps.append(Step(last.client, last.round, step, link, last.order, folder, entries))
        return steps


def open(path: str | os.PathLike[str]) -> RunArchive:
    """Open a recorded run by its folder.

    Raises:
        RunError: the folder is not a run's, or contains a link.
        IntegrityError: its manifest is damaged.
    """
    root = Path(path)
    try:
        check_linkless(root, apart=root / WITH_LINKS)
    except OSError as error:
        raise RunError(f"cannot read {root}: {error.filename}: {error.strerror}") from error
    return RunArchive(root)
