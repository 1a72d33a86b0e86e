"""``ObjectStore``: a shared place that keeps weights as objects, each written exactly once.

``create`` never overwrites. If the object exists, contents are compared: equal content counts as
written, by an earlier attempt or by the process that this one replaces; other content is an error.
So retries, restarted clients and two processes with one id cannot change a round.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sfl.errors import IntegrityError, RunError
from sfl.files import strict_json
from sfl.files.checksum import checksum
from sfl.files.regular_files import read_plain

Metadata = Mapping[str, str]


class ObjectStore(Protocol):
    """Objects by path. Calls block; several threads may use one store.

    Raises (from any method):
        RunError: the place cannot be used, or does not answer within the store's deadline.
    """

    title: str  # the address as the user gave it

    def check(self) -> None:
        """Check that the place exists and can be read."""
        ...

    def create(self, path: str, data: bytes, metadata: Metadata) -> None:
        """Write a new object.

        Raises:
            RunError: it exists with other content.
        """
        ...

    def names(self, prefix: str) -> list[str]:
        """Return the sorted paths of the objects that begin with ``prefix``."""
        ...

    def read(self, path: str, most_bytes: int | None = None) -> tuple[bytes, Metadata] | None:
        """Return an object's content and metadata, or None if it does not exist.

        Raises:
            IntegrityError: the content is damaged, or larger than ``most_bytes``.
        """
        ...

    def delete(self, path: str) -> None:
        """Remove an object, if it exists."""
        ...


def is_there(store: ObjectStore, path: str, data: bytes) -> bool:
    """Return whether an object exists with this content.

    Raises:
        RunError: it exists with other content.
    """
    found = store.read(path)
    if found is not None and found[0] != data:
        raise RunError(
            f"{store.title}/{path} is there already with other content ({checksum(found[0])}; ours"
            f" {checksum(data)}): another process writes as the same client of this run"
        )
    return found is not None


def compare(store: ObjectStore, path: str, data: bytes) -> None:
    """Check that an existing object has our content.

    Raises:
        RunError: it has other content, or has been deleted meanwhile.
    """
    if not is_there(store, path, data):
        raise RunError(f"{store.title}/{path} was there, and is not any more: who deletes it?")


def check_size(where: str, size: int, most_bytes: int | None) -> None:
    """Refuse an object that is too large, before it is read.

    Raises:
        IntegrityError: ``size`` exceeds ``most_bytes``.
    """
    if most_bytes is not None and size > most_bytes:
        raise IntegrityError(f"{where}: has {size} bytes, at most {most_bytes} are expected")


class Directory:
    """Objects as files of a folder, on any file system that the machines share.

    Metadata are in ``<name>.about`` beside an object, which is written first.
    """

    def __init__(self, root: str) -> None:
        self.title = f"dir:{root}"
        self._root = Path(root).expanduser()

    def check(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            next(self._root.iterdir(), None)
        except OSError as error:
            raise RunError(f"cannot use {self.title}: {error.strerror}") from error

    def create(self, path: str, data: bytes, metadata: Metadata) -> None:
        described = json.dumps(dict(metadata), sort_keys=True).encode()
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            about = _about(target)
            if not _create_file(about, described) and about.read_bytes() != described:
                # Another process wrote the metadata first: only its object may follow.
                if not is_there(self, path, data):
                    raise RunError(
                        f"{self.title}/{path} is described otherwise already: another process"
                        " writes as the same client of this run"
                    )
            elif not _create_file(target, data):
                compare(self, path, data)
        except OSError as error:
            raise RunError(f"cannot write {self.title}/{path}: {error.strerror}") from error

    def names(self, prefix: str) -> list[str]:
        folder = (self._root / prefix).parent
        files = (f.relative_to(self._root).as_posix() for f in folder.rglob("*") if f.is_file())
        found = (name for name in files if name.startswith(prefix))
        return sorted(name for name in found if not name.endswith((ABOUT, CLAIM, TEMPORARY)))

    def read(self, path: str, most_bytes: int | None = None) -> tuple[bytes, Metadata] | None:
        file = self._root / path
        try:
            check_size(f"{self.title}/{path}", file.stat().st_size, most_bytes)
            data = read_plain(file)
            metadata = strict_json.loads(read_plain(_about(file)))
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise IntegrityError(f"{self.title}/{path}: is a folder") from error
        except OSError as error:
            raise RunError(f"cannot read {self.title}/{path}: {error.strerror}") from error
        except ValueError as error:
            raise IntegrityError(f"{self.title}/{path}: its description is damaged") from error
        if not isinstance(metadata, dict):
            raise IntegrityError(f"{self.title}/{path}: its description is damaged")
        return data, metadata

    def delete(self, path: str) -> None:
        file = self._root / path
        for one in (file, _about(file)):
            one.unlink(missing_ok=True)
            _claim(one).unlink(missing_ok=True)


ABOUT, CLAIM, TEMPORARY = ".about", ".claim", ".tmp"  # suffixes of files that are not objects


def _about(path: Path) -> Path:
    return path.with_name(path.name + ABOUT)


def _claim(path: Path) -> Path:
    return path.with_name(path.name + CLAIM)


def _create_file(path: Path, data: bytes) -> bool:
    """Create a file atomically; return False if it exists."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)  # fails if the name is taken, unlike a rename
        except FileExistsError:
            raise
        except OSError:  # without hard links: claim the name, then rename
            claim = _claim(path)
            if path.exists() or not claim.exists():  # else who claimed it was killed
                claim.touch(exist_ok=False)
            temporary.rename(path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True
