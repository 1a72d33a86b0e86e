"""Writing a run's folder: a background thread writes each file atomically, then its manifest line.

Files that a round starts from are synced before the round's checkpoint lists them; see
``sfl.archive.checkpoint``.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfl.archive.checkpoint import NUM_KEPT, Checkpoint, checkpoint_paths, path_of
from sfl.archive.layout import client_folder, tensor_name
from sfl.archive.manifest import Entry
from sfl.archive.manifests import Manifests
from sfl.archive.retention import Retention
from sfl.archive.write_queue import WriteQueue
from sfl.crash import crash_point
from sfl.files.atomic import BINARY, sync, write_file
from sfl.files.checksum import File, checksum
from sfl.files.torch_file import TensorSpec
from sfl.files.torch_reader import Buffer
from sfl.values import KeepModels, KeepTensors, Position

ALL_MODELS = KeepModels.parse("all")
# Kinds of files that a server writes again when a run is resumed.
REWRITTEN = ("config", "environment", "summary", "events")
Tensors = Mapping[str, tuple[File, TensorSpec]]  # of one step at one cut, by kind


class ArchiveWriter:
    """Writes a run's files and manifests on a background thread. Closed by ``with``.

    Raises (from any method, after a write failed):
        RunError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path, keep: KeepTensors, models: KeepModels = ALL_MODELS) -> None:
        self._root = root
        self._keep = keep
        self._queue = WriteQueue(root)
        self._last_commit = 0  # number of its job in the queue
        # Used by the queue's thread alone.
        self._manifests = Manifests(root)
        self._retention = Retention(root, self._manifests, keep, models)
        self._written: dict[str, tuple[int, str]] = {}  # files that the next checkpoint may list

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._queue.close()
        self._manifests.close_all()

    def records(self, round_index: int) -> bool:
        """Return whether tensors of this round are written."""
        return self._keep.records(round_index)

    def record_step(self, tensors: Tensors, at: Position, order: int) -> None:
        """Write the tensors of a step at a cut, if those of its round are kept.

        ``order``: number of steps that its back had taken before. The buffers must not change
        afterwards.
        """
        if self.records(at.round):
            num_bytes = sum(len(file.data) for file, _ in tensors.values())
            self._queue.submit(lambda: self._write_step(tensors, at, order), num_bytes)

    def tensor_path(self, kind: str, at: Position) -> str:
        """Return where ``record_step`` writes a tensor; "" if those of its round are not kept."""
        if not self.records(at.round):
            return ""
        return f"{client_folder(self._root, at.client, at.round)}/{tensor_name(kind, at)}"

    def write(
        self,
        kind: str,
        path: str,
        data: Buffer,
        round_index: int = -1,
        clients: tuple[int, ...] = (),
    ) -> None:
        """Write and list a file of the run itself (a model, a log), by its path in the folder.

        ``clients``: the clients of a round, for the round's log.
        """
        self._queue.submit(
            lambda: self._write_listed(kind, path, data, round_index, clients), len(data)
        )

    def append(self, path: str, data: bytes) -> None:
        """Append to a file that no manifest lists, and sync it."""
        self._queue.submit(lambda: self._append(path, data), len(data))

    def commit(
        self,
        round_index: int,
        config: Mapping[str, Any],
        about: Mapping[str, Any],
        paths: Collection[str],
    ) -> None:
        """Write the checkpoint that a round starts from; its files were submitted before."""
        checkpoint = Checkpoint(self._root, round_index, config, about, {})
        self._last_commit = self._queue.submit(lambda: self._commit(checkpoint, paths))

    def keep_best(self, round_index: int) -> None:
        """From the next ``commit`` on, keep the models of this round, the best; -1: of none."""

        def keep() -> None:
            self._retention.best = round_index

        if round_index >= 0:
            self._queue.submit(keep)

    def wait_committed(self) -> None:
        """Wait until all submitted checkpoints are on disk."""
        self._queue.wait_done(self._last_commit)

    def discard_from(self, round_index: int, rewritten: Collection[str] = ()) -> None:
        """Remove files of this round and later ones, which are repeated.

        Files of the kinds in ``rewritten`` are only removed from the manifest.
        """
        self._queue.submit(lambda: self._retention.discard_from(round_index, rewritten))

    def drop_steps(self, client: int, round_index: int) -> None:
        """Remove the tensors of a client whose part of a round is undone."""
        self._queue.submit(
            lambda: self._retention.remove(client_folder(self._root, client, round_index))
        )

    def end_round(self, round_index: int) -> None:
        """List the round's manifests when all is on disk, and remove tensors that are not kept."""
        if self._queue.num_submitted:
            self._queue.submit(lambda: self._retention.close_round(round_index))

    def take_lag_s(self) -> float:
        """Return the longest time that a write took from its submission, since the last call."""
        return self._queue.take_lag_s()

    def flush(self) -> None:
        """Wait until everything submitted is on disk."""
        self._queue.wait_done(self._queue.num_submitted)

    def _write_step(self, tensors: Tensors, at: Position, order: int) -> None:
        folder = client_folder(self._root, at.client, at.round)
        if not self._manifests.is_open(folder):
            folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for kind, (file, spec) in tensors.items():
            name, data = tensor_name(kind, at), file.data
            write_file(f"{folder}/{name}", data)
            entries.append(Entry(
                kind, name, len(data), file.checksum or checksum(data), at.client, at.round,
                at.step, at.link, order, shape=spec.shape,
                dtype=str(spec.dtype).removeprefix("torch."),
            ))  # fmt: skip
        self._manifests.add(folder, *entries)

    def _write_listed(
        self, kind: str, path: str, data: Buffer, round_index: int, clients: tuple[int, ...]
    ) -> None:
        folder = (self._root / path).parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        write_file(self._root / path, data, durable=True)
        entry = Entry(kind, path, len(data), checksum(data), round=round_index, clients=clients)
        self._manifests.add(self._root, entry)
        self._retention.note_model(entry)
        self._written[path] = entry.bytes, entry.checksum

    def _append(self, path: str, data: bytes) -> None:
        crash_point("rounds_csv.before")
        # Without O_CREAT: a file removed during the run must not be replaced by an incomplete one.
        descriptor = os.open(self._root / path, os.O_WRONLY | os.O_APPEND | BINARY)
        with open(descriptor, "ab", buffering=0) as stream:
            stream.write(data)
            os.fsync(stream.fileno())
        crash_point("rounds_csv.after")

    def _commit(self, checkpoint: Checkpoint, paths: Collection[str]) -> None:
        self._written = {path: self._written[path] for path in paths}
        self._manifests.sync()
        target = self._root / path_of(checkpoint.round)
        if not target.parent.is_dir():
            target.parent.mkdir()
            sync(self._root)
        whole = replace(checkpoint, files=self._written)
        write_file(target, whole.encode(), durable=True, what="checkpoint")
        for path in checkpoint_paths(self._root)[NUM_KEPT:]:
            path.unlink()
        crash_point("checkpoint.after_removal")
        self._retention.drop_models()
