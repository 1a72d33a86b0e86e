"""What a party goes on from: a record of the files that a round starts with.

``checkpoints/round_004.json`` says that the rounds before the fourth (from 0) are done, and names
each file that this round starts from, with its checksum. It is written last, under a temporary
name, synced and renamed: a round counts as done once its successor's checkpoint is there. The one
before stays until then, and after; so there is always one that is whole::

    models/..._003.pt, ...       each synced, before the checkpoint names them
    rounds/round_003.csv, rounds.csv
    checkpoints/round_004.json   renamed: round 3 is done
    checkpoints/round_002.json   removed

Nothing random is saved: every draw derives from (seed, purpose, round, client, step).
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
MAX_BYTES = 64 * 2**20  # of one that is read; what says so much about 100,000 clients is smaller
_NAME = re.compile(r"round_(\d{3,9})\.json")


def path_of(round_index: int) -> str:
    """Return where the checkpoint lies that a round starts from, in a run's folder."""
    return f"{FOLDER}/round_{round_index:03d}.json"


@dataclass(frozen=True)
class Checkpoint:
    """What one round starts from."""

    root: Path  # of the run's folder
    round: int  # that starts from it; those before are done
    config: Mapping[str, Any]  # of the run
    about: Mapping[str, Any]  # what else its writer has to know when it goes on
    files: Mapping[str, tuple[int, str]]  # path in the folder -> bytes and checksum

    def encode(self) -> bytes:
        """Return the content of its file, which ends in its own checksum."""
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
        """Say whether a file is part of it."""
        return path in self.files

    def read(self, path: str) -> bytes:
        """Return the checked bytes of a file, by its path in the folder.

        Raises:
            IntegrityError: it is damaged or missing.
        """
        if path not in self.files:
            raise IntegrityError(f"{self.root / path}: is not in the checkpoint")
        num_bytes, check = self.files[path]
        return read_checked(self.root / path, Entry("", path, num_bytes, check))

    def state(self, path: str, spec: StateSpec) -> dict[str, Tensor]:
        """Return the weights in a file.

        Raises:
            IntegrityError: as ``read``.
        """
        return decode_state(self.read(path), spec, str(self.root / path))

    def verify(self) -> None:
        """See that all its files are there and whole.

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
    """Return the round that starts from a checkpoint, by its name; -1 if it is none."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else -1


def lying(root: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, the newest first, whatever their state."""
    found = [p for p in (root / FOLDER).glob("round_*.json") if round_of(p) >= 0]
    return sorted(found, key=round_of, reverse=True)


def whole(root: Path, run: RunConfig, damage: list[str]) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a run that are whole, the newest first.

    What is wrong with the others goes to ``damage``.

    Raises:
        RunError: one is of another run, configuration or version: nothing goes on from it.
    """
    for path in lying(root):
        try:
            checkpoint = _parse(root, path)
            _check_config(path, checkpoint, run)
            checkpoint.verify()
        except IntegrityError as error:
            damage.append(str(error))
            continue
        yield checkpoint


def _check_config(path: Path, checkpoint: Checkpoint, run: RunConfig) -> None:
    try:
        check_goes_on(checkpoint.config, asdict(run))
    except ConfigError as error:
        raise RunError(f"{path}: is of another configuration: {error}") from error
