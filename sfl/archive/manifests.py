"""The manifests of a run's folder, as they are written: a line for each file that is whole."""

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
    """The manifest of a run's folder, and those of its folders of tensors, open for appending.

    For one thread at a time.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[Path, FileIO] = {}  # by their folder

    def is_open(self, folder: Path) -> bool:
        """Say whether something was listed there since it was opened."""
        return folder in self._files

    def has_unfinished(self) -> bool:
        """Say whether a folder of tensors is open."""
        return bool(self._files.keys() - {self._root})

    def add(self, folder: Path, *entries: Entry) -> None:
        """List files in the manifest of their folder."""
        if folder not in self._files:
            path = folder / MANIFEST
            _cut_torn_line(path)
            self._files[folder] = open(path, "ab", buffering=0)  # noqa: SIM115
        lines = "".join(manifest_line(entry) + "\n" for entry in entries)
        write_all(self._files[folder].fileno(), lines.encode())
        crash_point("manifest.after_lines")

    def finish_round(self, round_index: int) -> None:
        """Close the manifests of all folders of tensors, and list them in the run's own."""
        for folder in [folder for folder in self._files if folder != self._root]:
            self.close(folder)
            data = (folder / MANIFEST).read_bytes()
            name = (folder / MANIFEST).relative_to(self._root).as_posix()
            entry = Entry("manifest", name, len(data), checksum(data), round=round_index)
            self.add(self._root, entry)

    def sync(self) -> None:
        """Let the run's own manifest outlast a loss of power.

        Raises:
            RunError: it was removed.
        """
        if manifest := self._files.get(self._root):
            os.fsync(manifest.fileno())
            if not os.fstat(manifest.fileno()).st_nlink:
                raise RunError(f"{self._root / MANIFEST} is gone: it was removed")

    def close(self, folder: Path) -> None:
        """Close the manifest of a folder, if it is open."""
        if manifest := self._files.pop(folder, None):
            manifest.close()

    def close_all(self) -> None:
        """Close all, also on a disk that fails."""
        for manifest in self._files.values():
            with contextlib.suppress(OSError):  # what it could not write has been said already
                manifest.close()


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that was being written when a run was killed."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
