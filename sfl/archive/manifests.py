"""Writing the manifests of a run's folder: one line per complete file."""

import contextlib
import os
from io import FileIO
from pathlib import Path

from sfl.archive.layout import MANIFEST
from sfl.archive.manifest import Entry, manifest_line
from sfl.crash import crash_point
from sfl.errors import RunError
from sfl.files.atomic import write_all
from sfl.files.checksum import checksum


class Manifests:
    """The manifests of a run's folder and of its folders of tensors, open for appending.

    Not thread-safe.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[Path, FileIO] = {}  # by folder

    def is_open(self, folder: Path) -> bool:
        """Return whether a folder's manifest is open."""
        return folder in self._files

    def has_unfinished(self) -> bool:
        """Return whether the manifest of a folder of tensors is open."""
        return bool(self._files.keys() - {self._root})

    def add(self, folder: Path, *entries: Entry) -> None:
        if folder not in self._files:
            path = folder / MANIFEST
            _cut_torn_line(path)
            self._files[folder] = open(path, "ab", buffering=0)  # noqa: SIM115
        lines = "".join(manifest_line(entry) + "\n" for entry in entries)
        write_all(self._files[folder].fileno(), lines.encode())
        crash_point("manifest.after_lines")

    def finish_round(self, round_index: int) -> None:
        """Close the manifests of all folders of tensors, and list them in the run's manifest."""
        for folder in [folder for folder in self._files if folder != self._root]:
            self.close(folder)
            data = (folder / MANIFEST).read_bytes()
            name = (folder / MANIFEST).relative_to(self._root).as_posix()
            entry = Entry("manifest", name, len(data), checksum(data), round=round_index)
            self.add(self._root, entry)

    def sync(self) -> None:
        """Sync the run's manifest to disk.

        Raises:
            RunError: the manifest was removed.
        """
        if manifest := self._files.get(self._root):
            os.fsync(manifest.fileno())
            if not os.fstat(manifest.fileno()).st_nlink:
                raise RunError(f"{self._root / MANIFEST} is gone: it was removed")

    def close(self, folder: Path) -> None:
        if manifest := self._files.pop(folder, None):
            manifest.close()

    def close_all(self) -> None:
        """Close all manifests; ignore errors of the disk."""
        for manifest in self._files.values():
            with contextlib.suppress(OSError):  # reported before, by the failed write
                manifest.close()


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a run that was killed."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
