"""Writing a run's folder: on a thread of its own, each file atomically, with its manifest line."""

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from sfl.archive import DROPPED, MANIFEST, ROUND_LOG, Entry, client_folder, manifest_line
from sfl.config import KeepTensors
from sfl.errors import RunError, reason_of
from sfl.protocol import checksum
from sfl.tensors import Buffer, TensorSpec

# Tensors that wait to be written; when there are more, the run waits for the disk.
MAX_PENDING_BYTES = 256 * 2**20


def write_file(path: Path, data: Buffer, *, durable: bool = False) -> None:
    """Write a file under a temporary name and rename it: under its name it is whole.

    What is ``durable`` is so after a loss of power, too, and there when this returns.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", buffering=0) as stream:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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


class ArchiveWriter:
    """Write tensors and their manifests on a thread of its own. Closed by ``with``.

    Raises (from any method, once the thread has met it):
        RunError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, root: Path, keep: KeepTensors) -> None:
        self._root = root
        self._keep = keep
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending_bytes = 0
        self._num_pending = 0
        self._failure: Exception | None = None
        self._manifests: dict[Path, TextIO] = {}
        self._thread: threading.Thread | None = None  # started by the first job

    def __enter__(self) -> "ArchiveWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        for manifest in self._manifests.values():
            with contextlib.suppress(OSError):  # what it could not write has been said already
                manifest.close()

    def record(self, kind: str, data: Buffer, spec: TensorSpec, entry: Mapping[str, int]) -> None:
        """Write one tensor of a step, if its round's tensors stay.

        ``entry`` gives ``client``, ``round``, ``step`` and ``order``. ``data`` must not change
        afterwards.
        """
        if self._keep.records(entry["round"]):
            dtype = str(spec.dtype).removeprefix("torch.")
            self._submit(
                lambda: self._write_tensor(kind, data, spec.shape, dtype, entry), len(data)
            )

    def write(self, kind: str, path: str, data: Buffer, round_index: int = -1) -> None:
        """Write and list a file of the run itself (a model, a log), by its path in the folder."""
        self._submit(lambda: self._write_listed(kind, path, data, round_index), len(data))

    def end_round(self, round_index: int) -> None:
        """Wait until all is on disk, list the round's manifests, and drop what does not stay."""
        if self._thread is None:
            return  # nothing was handed over
        self._submit(lambda: self._close_round(round_index), 0)
        self.flush()

    def flush(self) -> None:
        """Wait until everything that was handed over is on disk."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_pending == 0 or self._failure is not None)
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            reason = getattr(self._failure, "strerror", None) or reason_of(self._failure)
            raise RunError(f"cannot write to {self._root}: {reason}") from self._failure

    def _submit(self, job: Callable[[], None], num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._pending_bytes <= MAX_PENDING_BYTES or self._failure is not None
            )
            self._check()
            self._pending_bytes += num_bytes
            self._num_pending += 1

        def run() -> None:
            try:
                if self._failure is None:
                    job()
            except Exception as error:  # noqa: BLE001 - the thread's edge; _check raises it
                self._failure = error
            with self._changed:
                self._pending_bytes -= num_bytes
                self._num_pending -= 1
                self._changed.notify_all()

        self._jobs.put(run)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write_tensor(
        self, kind: str, data: Buffer, shape: tuple[int, ...], dtype: str, at: Mapping[str, int]
    ) -> None:
        folder = client_folder(self._root, at["client"], at["round"])
        name = f"{kind}_{at['round']}_{at['step']}.pt"
        if folder not in self._manifests:
            folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, data)
        entry = Entry(kind, name, len(data), checksum(data), shape=shape, dtype=dtype, **at)
        self._list(folder, entry)

    def _write_listed(self, kind: str, path: str, data: Buffer, round_index: int) -> None:
        folder = (self._root / path).parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        write_file(self._root / path, data, durable=True)
        self._list(self._root, Entry(kind, path, len(data), checksum(data), round=round_index))
        if kind == ROUND_LOG:  # the round is done when this line is there, and all before it
            os.fsync(self._manifests[self._root].fileno())

    def _list(self, folder: Path, entry: Entry) -> None:
        if folder not in self._manifests:
            path = folder / MANIFEST
            _cut_torn_line(path)
            self._manifests[folder] = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._manifests[folder].write(manifest_line(entry) + "\n")

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
