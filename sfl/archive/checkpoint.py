"""Checkpoints: each lists the files that a round starts from.

``checkpoints/round_004.json`` states that rounds 0 to 3 are done, and lists each file that round 4
starts from, with its checksum. It is written last, under a temporary name, synced and renamed: a
round is done once the next round's checkpoint exists. The two newest checkpoints are kept, so that
one is always complete::

    models/..._003.pt, ...       each synced, before the checkpoint lists them
    rounds/round_003.csv, rounds.csv
    checkpoints/round_004.json   renamed: round 3 is done
    checkpoints/round_002.json   removed

No generator states are saved: every draw derives from (seed, purpose, round, client, step).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sfl.archive.manifest import Entry, check_inside, read_checked
from sfl.archive.records import about_of, count_of, size_of
from sfl.config import RunConfig
from sfl.errors import ConfigError, IntegrityError, RunError, quoted
from sfl.files import strict_json
from sfl.files.checksum import checksum
from sfl.files.regular_files import read_plain
from sfl.files.torch_file import StateSpec, decode_state
from sfl.options import check_goes_on

VERSION = 1
FOLDER = "checkpoints"
NUM_KEPT = 2
MAX_BYTES = 64 * 2**20  # of a checkpoint; one of a run with 100,000 clients is smaller
_NAME = re.compile(r"round_(\d{3,9})\.json")


def path_of(round_index: int) -> str:
    """Return the path, in a run's folder, of the checkpoint that a round starts from."""
    return f"{FOLDER}/round_{round_index:03d}.json"


@dataclass(frozen=True)
class Checkpoint:
    """What one round starts from."""

    root: Path  # the run's folder
    round: int  # the round that starts from it
    config: Mapping[str, Any]  # of the run
    about: Mapping[str, Any]  # what else its writer needs to resume
    files: Mapping[str, tuple[int, str]]  # path in the folder -> size in bytes, checksum

    def encode(self) -> bytes:
        """Return the content of the checkpoint's file, including its own checksum."""
        fields = {
            "version": VERSION,
            "round": self.round,
            "config": dict(self.config),
            "about": dict(self.about),
            "files": {path: list(what) for path, what in self.files.items()},
        }
        fields["check"] = checksum(json.dumps(fields).encode())
        return (json.dumps(fields) + "\n").encode()

    def lists(self, path: str) -> bool:
        """Return whether the checkpoint lists a file."""
        return path in self.files

    def read(self, path: str) -> bytes:
        """Return the bytes of a listed file, verified, by its path in the folder.

        Raises:
            IntegrityError: it is damaged or missing.
        """
        if path not in self.files:
            raise IntegrityError(f"{self.root / path}: is not in the checkpoint")
        num_bytes, check = self.files[path]
        return read_checked(self.root / path, Entry("", path, num_bytes, check))

    def state(self, path: str, spec: StateSpec) -> dict[str, Tensor]:
        """Return the weights in a listed file.

        Raises:
            IntegrityError: as in ``read``.
        """
        return decode_state(self.read(path), spec, str(self.root / path))

    def verify(self) -> None:
        """Check that all listed files are present and undamaged.

        Raises:
            IntegrityError: one is not.
        """
        for path in self.files:
            self.read(path)


def _parse(root: Path, path: Path) -> Checkpoint:
    try:
        fields = strict_json.loads(read_plain(path, 0, MAX_BYTES))
        if fields["version"] != VERSION:
            raise RunError(
                f"{path}: is of version {quoted(fields['version'], 20)}; we read {VERSION}"
            )
        check = fields.pop("check")
        if checksum(json.dumps(fields).encode()) != check:
            raise ValueError("its checksum differs")
        if count_of(fields["round"]) != round_of(path) or not isinstance(fields["config"], dict):
            raise ValueError("it is of another round than its name, or of no configuration")
        files = {}
        for name, (size, what) in fields["files"].items():
            check_inside(name)
            files[name] = size_of(size), str(what)
        about = about_of(fields["about"])
        return Checkpoint(root, fields["round"], fields["config"], about, files)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path}: is damaged: {error}") from error


def round_of(path: Path) -> int:
    """Return the round that starts from a checkpoint, by its file name; -1 for another file."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else -1


def checkpoint_paths(root: Path) -> list[Path]:
    """Return the paths of the checkpoints in a run's folder, newest first; some may be damaged."""
    found = [p for p in (root / FOLDER).glob("round_*.json") if round_of(p) >= 0]
    return sorted(found, key=round_of, reverse=True)


def valid_checkpoints(root: Path, run: RunConfig, damage: list[str]) -> Iterator[Checkpoint]:
    """Yield the undamaged checkpoints of a run, newest first.

    A line about each damaged one is appended to ``damage``.

    Raises:
        RunError: one has another configuration or version.
    """
    for path in checkpoint_paths(root):
        try:
            checkpoint = _parse(root, path)
            _check_config(path, checkpoint, run)
            checkpoint.verify()
        except IntegrityError as error:
            if path.exists():  # else a run that goes on has removed it since
                damage.append(str(error))
            continue
        yield checkpoint


def _check_config(path: Path, checkpoint: Checkpoint, run: RunConfig) -> None:
    try:
        check_goes_on(checkpoint.config, asdict(run))
    except ConfigError as error:
        raise RunError(f"{path}: is of another configuration: {error}") from error
