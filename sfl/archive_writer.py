"""Writing a run's folder: off the critical path, each file atomically, with its manifest line.

A background thread writes. What a round starts from is synced before the round's checkpoint names
it; see ``sfl.checkpoint``.
"""

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from sfl.archive import (
    DROPPED,
    MANIFEST,
    MODELS,
    Entry,
    client_folder,
    manifest_line,
    read_manifest,
    round_of_folder,
)
from sfl.checkpoint import NUM_KEPT, Checkpoint, lying, path_of, round_of
from sfl.config import KeepModels, KeepTensors
from sfl.crash import crash_point
from sfl.errors import RunError, reason_of
from sfl.protocol import File, checksum
from sfl.saved import Buffer
from sfl.tensors import TensorSpec

# Of what waits to be written; whoever hands over more waits for the disk.
MAX_PENDING_BYTES = 256 * 2**20
_BINARY: int = getattr(os, "O_BINARY", 0)  # on Windows
ALL_MODELS = KeepModels.parse("all")
# Files that a server writes anew when a run goes on; until then they are in no manifest.
REWRITTEN = ("config", "environment", "summary", "events")


def write_file(
    path: Path | str, data: Buffer, *, durable: bool = False, what: str = "file"
) -> None:
    """Write a file under a temporary name and rename it: under its name it is whole.

    What is ``durable`` is so after a loss of power, too, and there when this returns. ``what`` is
    its part in the names of ``sfl.crash``.
    """
    temporary = f"{path}.tmp"
    try:
        stream = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
        try:
            _write_all(stream, data)
            if durable:
                os.fsync(stream)
        finally:
            os.close(stream)
        crash_point(f"{what}.before_rename")
        os.replace(temporary, path)
        crash_point(f"{what}.after_rename")
        if durable:
            sync(Path(path).parent)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _name(kind: str, at: Mapping[str, int]) -> str:
    return f"{kind}_{at['round']}_{at['step']}.pt"


def sync(path: Path) -> None:
    """Let a file, or what was created and renamed in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that was being written when a run was killed."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


class _Job(NamedTuple):
    run: Callable[[], None]
    num_bytes: int
    handed_over_at: float


class ArchiveWriter:
    """Write tensors and their manifests off the critical path. Closed by ``with``.

    Raises (from any method, once it was met):
        RunError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path, keep: KeepTensors, models: KeepModels = ALL_MODELS) -> None:
        self._root = root
        self._keep = keep
        self._keep_models = models
        self._models: dict[int, set[str]] = {}  # by their round, of those that may go some day
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._num_handed_over = self._num_done = 0  # jobs
        self._last_commit = 0  # which of the jobs it was
        self._pending_bytes = 0  # of the jobs that are not done
        self._longest_lag_s = 0.0
        self._failure: Exception | None = None
        self._ended = False
        self._thread: threading.Thread | None = None  # started by the first job
        self._manifests: dict[Path, FileIO] = {}
        self._written: dict[str, tuple[int, str]] = {}  # what the next checkpoint may name

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for manifest in self._manifests.values():
            with contextlib.suppress(OSError):  # what it could not write has been said already
                manifest.close()

    def records(self, round_index: int) -> bool:
        """Say whether tensors of this round are written."""
        return self._keep.records(round_index)

    def record_step(
        self, tensors: Mapping[str, tuple[File, TensorSpec]], entry: Mapping[str, int]
    ) -> None:
        """Write the tensors of a step, by their kind, if its round's stay.

        ``entry`` gives ``client``, ``round``, ``step`` and ``order``. The files must not change
        afterwards.
        """
        if self.records(entry["round"]):
            num_bytes = sum(len(file.data) for file, _ in tensors.values())
            self._submit(lambda: self._write_step(tensors, entry), num_bytes)

    def place(self, kind: str, at: Mapping[str, int]) -> str:
        """Return where ``record_step`` writes a tensor; "" if those of its round do not stay."""
        if not self.records(at["round"]):
            return ""
        return f"{client_folder(self._root, at['client'], at['round'])}/{_name(kind, at)}"

    def write(
        self,
        kind: str,
        path: str,
        data: Buffer,
        round_index: int = -1,
        clients: tuple[int, ...] = (),
    ) -> None:
        """Write and list a file of the run itself (a model, a log), by its path in the folder.

        ``clients``: whom a round's log is of.
        """
        self._submit(lambda: self._write_listed(kind, path, data, round_index, clients), len(data))

    def append(self, path: str, data: bytes) -> None:
        """Append to a file that no manifest lists, and sync it."""
        self._submit(lambda: self._append(path, data), len(data))

    def commit(
        self,
        round_index: int,
        config: Mapping[str, Any],
        about: Mapping[str, Any],
        paths: Collection[str],
    ) -> None:
        """Write the checkpoint that a round starts from, of files that were handed over before."""
        checkpoint = Checkpoint(self._root, round_index, config, about, {})
        self._last_commit = self._submit(lambda: self._commit(checkpoint, paths))

    def wait_committed(self) -> None:
        """Wait until all checkpoints that were handed over are on disk."""
        self._wait_done(self._last_commit)

    def begin_at(self, round_index: int, anew: Collection[str] = ()) -> None:
        """Forget what was written of this round and later ones: they are done again.

        Also files of the kinds that are written ``anew``.
        """
        self._submit(lambda: self._forget(round_index, anew))

    def drop_steps(self, client: int, round_index: int) -> None:
        """Remove the tensors of a client that left a round without a trace."""
        self._submit(lambda: self._remove(client_folder(self._root, client, round_index)))

    def end_round(self, round_index: int) -> None:
        """List the round's manifests when all is on disk, and drop what does not stay."""
        if self._num_handed_over:
            self._submit(lambda: self._close_round(round_index))

    def take_lag_s(self) -> float:
        """Return how long, at most, something waited to be on disk since the last call."""
        with self._changed:
            lag_s, self._longest_lag_s = self._longest_lag_s, 0.0
        return lag_s

    def flush(self) -> None:
        """Wait until everything that was handed over is on disk."""
        self._wait_done(self._num_handed_over)

    def _check(self) -> None:
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or reason_of(self._failure)
            if name := getattr(self._failure, "filename", None):
                reason = f"{reason}: {name}"
            raise RunError(f"cannot write to {self._root}: {reason}") from self._failure

    def _submit(self, run: Callable[[], None], num_bytes: int = 0) -> int:
        """Hand over a job once there is room for its bytes; return which job of all it is."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._pending_bytes <= MAX_PENDING_BYTES or self._failure is not None
            )
            self._check()
            self._pending_bytes += num_bytes
            self._jobs.append(_Job(run, num_bytes, time.monotonic()))
            self._num_handed_over += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
                self._thread.start()
            return self._num_handed_over

    def _wait_done(self, number: int) -> None:
        """Wait until so many jobs are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_done >= number or self._failure is not None)
        self._check()

    def _work(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Wait for a job and do it; False: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended)
            if not self._jobs:
                return False
            job = self._jobs.popleft()
        try:
            if self._failure is None:
                job.run()
        except Exception as error:  # noqa: BLE001 - _check raises it
            self._failure = error
        with self._changed:
            self._num_done += 1
            self._pending_bytes -= job.num_bytes
            lag_s = time.monotonic() - job.handed_over_at
            self._longest_lag_s = max(self._longest_lag_s, lag_s)
            self._changed.notify_all()
        return True

    def _write_step(
        self, tensors: Mapping[str, tuple[File, TensorSpec]], at: Mapping[str, int]
    ) -> None:
        folder = client_folder(self._root, at["client"], at["round"])
        if folder not in self._manifests:
            folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for kind, (file, spec) in tensors.items():
            name, data = _name(kind, at), file.data
            write_file(f"{folder}/{name}", data)
            entries.append(Entry(
                kind, name, len(data), file.checksum or checksum(data), client=at["client"],
                round=at["round"], step=at["step"], order=at["order"], shape=spec.shape,
                dtype=str(spec.dtype).removeprefix("torch."),
            ))  # fmt: skip
        self._list(folder, *entries)

    def _write_listed(
        self, kind: str, path: str, data: Buffer, round_index: int, clients: tuple[int, ...]
    ) -> None:
        folder = (self._root / path).parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        write_file(self._root / path, data, durable=True)
        entry = Entry(kind, path, len(data), checksum(data), round=round_index, clients=clients)
        self._list(self._root, entry)
        self._note_model(entry)
        self._written[path] = entry.bytes, entry.checksum

    def _note_model(self, entry: Entry) -> None:
        """Take note of a model that does not stay for good."""
        if entry.path.startswith(MODELS) and not self._keep_models.stays(entry.round):
            self._models.setdefault(entry.round, set()).add(entry.path)

    def _drop_models(self) -> None:
        """Remove the models that no checkpoint goes on from any more; those noted need not stay."""
        oldest = round_of(lying(self._root)[-1]) - 1 - self._keep_models.behind
        for round_index in sorted(r for r in self._models if r < oldest):
            paths = sorted(self._models.pop(round_index))
            self._list(self._root, *(Entry(DROPPED, p, 0, "", round=round_index) for p in paths))
            for path in paths:
                (self._root / path).unlink(missing_ok=True)

    def _append(self, path: str, data: bytes) -> None:
        crash_point("rounds_csv.before")
        # It was there at the start: one that is made anew would lack what came before.
        descriptor = os.open(self._root / path, os.O_WRONLY | os.O_APPEND | _BINARY)
        with open(descriptor, "ab", buffering=0) as stream:
            stream.write(data)
            os.fsync(stream.fileno())
        crash_point("rounds_csv.after")

    def _commit(self, checkpoint: Checkpoint, paths: Collection[str]) -> None:
        self._written = {path: self._written[path] for path in paths}
        if self._root in self._manifests:
            manifest = self._manifests[self._root]
            os.fsync(manifest.fileno())
            if not os.fstat(manifest.fileno()).st_nlink:
                raise RunError(f"{self._root / MANIFEST} is gone: it was removed")
        target = self._root / path_of(checkpoint.round)
        if not target.parent.is_dir():
            target.parent.mkdir()
            sync(self._root)
        whole = replace(checkpoint, files=self._written)
        write_file(target, whole.encode(), durable=True, what="checkpoint")
        for path in lying(self._root)[NUM_KEPT:]:
            path.unlink()
        crash_point("checkpoint.after_removal")
        self._drop_models()

    def _forget(self, round_index: int, anew: Collection[str]) -> None:
        for folder in self._root.glob("client_files/client_*/round_*"):
            if (place := round_of_folder(folder)) and place[1] >= round_index:
                self._remove(folder)
        if self._manifests.keys() - {self._root}:  # of a round whose end we have not heard of
            self._close_round(round_index - 1)
        for path in lying(self._root):  # of later rounds, or damaged: not to be taken for whole
            if round_of(path) > round_index:
                path.unlink()
        if (self._root / MANIFEST).exists():
            self._shorten_manifest(round_index, anew)

    def _shorten_manifest(self, round_index: int, anew: Collection[str]) -> None:
        """Remove what is of this round or a later one, and what is about to be written anew."""
        if manifest := self._manifests.pop(self._root, None):
            manifest.close()
        kept = []
        self._models = {}
        for entry in read_manifest(self._root):
            if entry.round < round_index and entry.kind not in anew:
                kept.append(manifest_line(entry) + "\n")
                self._note_model(entry)
            elif entry.kind not in anew:
                (self._root / entry.path).unlink(missing_ok=True)
        write_file(self._root / MANIFEST, "".join(kept).encode(), durable=True)

    def _remove(self, folder: Path) -> None:
        if manifest := self._manifests.pop(folder, None):
            manifest.close()
        shutil.rmtree(folder, ignore_errors=True)

    def _list(self, folder: Path, *entries: Entry) -> None:
        if folder not in self._manifests:
            path = folder / MANIFEST
            _cut_torn_line(path)
            self._manifests[folder] = open(path, "ab", buffering=0)  # noqa: SIM115
        lines = "".join(manifest_line(entry) + "\n" for entry in entries)
        _write_all(self._manifests[folder].fileno(), lines.encode())
        crash_point("manifest.after_lines")

    def _close_round(self, round_index: int) -> None:
        for folder in [folder for folder in self._manifests if folder != self._root]:
            self._manifests.pop(folder).close()
            data = (folder / MANIFEST).read_bytes()
            name = (folder / MANIFEST).relative_to(self._root).as_posix()
            entry = Entry("manifest", name, len(data), checksum(data), round=round_index)
            self._list(self._root, entry)
        if self._keep.last and round_index > 0:
            for folder in self._root.glob(f"client_files/*/round_{round_index - 1:03d}"):
                name = (folder / MANIFEST).relative_to(self._root).as_posix()
                self._list(self._root, Entry(DROPPED, name, 0, "", round=round_index - 1))
                shutil.rmtree(folder)
