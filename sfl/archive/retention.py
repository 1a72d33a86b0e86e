"""Removing files from a run's folder: old tensors and models, and rounds that are redone."""

import shutil
from collections.abc import Collection
from pathlib import Path

from sfl.archive.checkpoint import checkpoint_paths, round_of
from sfl.archive.layout import MANIFEST, MODELS, round_of_folder
from sfl.archive.manifest import DROPPED, Entry, manifest_line, read_manifest
from sfl.archive.manifests import Manifests
from sfl.files.atomic import write_file
from sfl.values import KeepModels, KeepTensors


class Retention:
    """Removes files from a run's folder, and lists them as dropped. Not thread-safe."""

    def __init__(
        self, root: Path, manifests: Manifests, keep: KeepTensors, models: KeepModels
    ) -> None:
        self._root = root
        self._manifests = manifests
        self._keep = keep
        self._keep_models = models
        self.best: int | None = None  # the round whose models stay while it is the best
        self._models: dict[int, set[str]] = {}  # paths by round, of models to be removed later

    def note_model(self, entry: Entry) -> None:
        """Record an entry if it is a model that ``--keep-models`` does not keep."""
        if entry.path.startswith(MODELS) and not self._keep_models.stays(entry.round):
            self._models.setdefault(entry.round, set()).add(entry.path)

    def drop_models(self) -> None:
        """Remove the noted models that no checkpoint needs any more, but the best round's."""
        oldest = round_of(checkpoint_paths(self._root)[-1]) - 1 - self._keep_models.behind
        for round_index in sorted(r for r in self._models if r < oldest and r != self.best):
            paths = sorted(self._models.pop(round_index))
            gone = (Entry(DROPPED, p, 0, "", round=round_index) for p in paths)
            self._manifests.add(self._root, *gone)
            for path in paths:
                (self._root / path).unlink(missing_ok=True)

    def close_round(self, round_index: int) -> None:
        """List the manifests of a round's tensors; with ``last``, remove the previous round's."""
        self._manifests.finish_round(round_index)
        if self._keep.last and round_index > 0:
            for folder in self._root.glob(f"client_files/*/round_{round_index - 1:03d}"):
                name = (folder / MANIFEST).relative_to(self._root).as_posix()
                self._manifests.add(self._root, Entry(DROPPED, name, 0, "", round=round_index - 1))
                shutil.rmtree(folder)

    def remove(self, folder: Path) -> None:
        """Remove a folder of tensors without listing it as dropped."""
        self._manifests.close(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def discard_from(self, round_index: int, rewritten: Collection[str]) -> None:
        """Remove files of this round and later ones; unlist the kinds in ``rewritten``."""
        for folder in self._root.glob("client_files/client_*/round_*"):
            if (place := round_of_folder(folder)) and place[1] >= round_index:
                self.remove(folder)
        if self._manifests.has_unfinished():  # of the round before, whose end was not reported
            self.close_round(round_index - 1)
        for path in checkpoint_paths(self._root):
            if round_of(path) > round_index:
                path.unlink()
        if (self._root / MANIFEST).exists():
            self._shorten_manifest(round_index, rewritten)

    def _shorten_manifest(self, round_index: int, rewritten: Collection[str]) -> None:
        """Unlist files of this round and later ones, which are removed, and ``rewritten`` kinds."""
        self._manifests.close(self._root)
        kept = []
        self._models = {}
        for entry in read_manifest(self._root):
            if entry.round < round_index and entry.kind not in rewritten:
                kept.append(manifest_line(entry) + "\n")
                self.note_model(entry)
            elif entry.kind not in rewritten:
                (self._root / entry.path).unlink(missing_ok=True)
        write_file(self._root / MANIFEST, "".join(kept).encode(), durable=True)
