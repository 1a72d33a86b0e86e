"""What of a run's folder does not stay: tensors and models of older rounds, and what is redone."""

import shutil
from collections.abc import Collection
from pathlib import Path

from sfl.archive.checkpoint import lying, round_of
from sfl.archive.layout import MANIFEST, MODELS, round_of_folder
from sfl.archive.manifest import DROPPED, Entry, manifest_line, read_manifest
from sfl.archive.manifests import Manifests
from sfl.files.atomic import write_file
from sfl.values import KeepModels, KeepTensors


class Retention:
    """Remove files of a run's folder, and list that they are gone. For one thread at a time."""

    def __init__(
        self, root: Path, manifests: Manifests, keep: KeepTensors, models: KeepModels
    ) -> None:
        self._root = root
        self._manifests = manifests
        self._keep = keep
        self._keep_models = models
        self._models: dict[int, set[str]] = {}  # by their round, of those that may go some day

    def note_model(self, entry: Entry) -> None:
        """Take note of a model that does not stay for good."""
        if entry.path.startswith(MODELS) and not self._keep_models.stays(entry.round):
            self._models.setdefault(entry.round, set()).add(entry.path)

    def drop_models(self) -> None:
        """Remove the models that no checkpoint goes on from any more; those noted need not stay."""
        oldest = round_of(lying(self._root)[-1]) - 1 - self._keep_models.behind
        for round_index in sorted(r for r in self._models if r < oldest):
            paths = sorted(self._models.pop(round_index))
            gone = (Entry(DROPPED, p, 0, "", round=round_index) for p in paths)
            self._manifests.add(self._root, *gone)
            for path in paths:
                (self._root / path).unlink(missing_ok=True)

    def close_round(self, round_index: int) -> None:
        """List the manifests of a round's tensors, and drop the tensors that do not stay."""
        self._manifests.finish_round(round_index)
        if self._keep.last and round_index > 0:
            for folder in self._root.glob(f"client_files/*/round_{round_index - 1:03d}"):
                name = (folder / MANIFEST).relative_to(self._root).as_posix()
                self._manifests.add(self._root, Entry(DROPPED, name, 0, "", round=round_index - 1))
                shutil.rmtree(folder)

    def remove(self, folder: Path) -> None:
        """Remove a folder of tensors without a trace."""
        self._manifests.close(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def forget(self, round_index: int, anew: Collection[str]) -> None:
        """Remove what was written of this round and later ones, and files of the kinds ``anew``."""
        for folder in self._root.glob("client_files/client_*/round_*"):
            if (place := round_of_folder(folder)) and place[1] >= round_index:
                self.remove(folder)
        if self._manifests.has_unfinished():  # of a round whose end we have not heard of
            self.close_round(round_index - 1)
        for path in lying(self._root):  # of later rounds, or damaged: not to be taken for whole
            if round_of(path) > round_index:
                path.unlink()
        if (self._root / MANIFEST).exists():
            self._shorten_manifest(round_index, anew)

    def _shorten_manifest(self, round_index: int, anew: Collection[str]) -> None:
        """Remove what is of this round or a later one, and what is about to be written anew."""
        self._manifests.close(self._root)
        kept = []
        self._models = {}
        for entry in read_manifest(self._root):
            if entry.round < round_index and entry.kind not in anew:
                kept.append(manifest_line(entry) + "\n")
                self.note_model(entry)
            elif entry.kind not in anew:
                (self._root / entry.path).unlink(missing_ok=True)
        write_file(self._root / MANIFEST, "".join(kept).encode(), durable=True)
