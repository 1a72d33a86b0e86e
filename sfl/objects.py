"""A place outside the processes that keeps weights: objects by path, each written exactly once.

``create`` is create-only. Who finds an object there compares: the same content means that an
earlier try of ours, or of the process that we replace, got through; other content is an error. So a
retry, a restarted client or two processes with the same id never overwrite a round.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sfl.errors import IntegrityError, RunError
from sfl.protocol import checksum

Metadata = Mapping[str, str]


class ObjectStore(Protocol):
    """Objects by path. Calls block; several threads may use one store.

    Raises (from any method):
        RunError: the place cannot be used, or not within the store's deadline.
    """

    title: str  # the address, as the user gave it

    def check(self) -> None:
        """See that the place is there and may be read."""
        ...

    def create(self, path: str, data: bytes, metadata: Metadata) -> None:
        """Write an object that is not there yet.

        Raises:
            RunError: it is there with other content.
        """
        ...

    def read(self, path: str) -> tuple[bytes, Metadata] | None:
        """Return an object's content and metadata, or None if it is not there.

        Raises:
            IntegrityError: what arrived is not what is stored.
        """
        ...

    def delete(self, path: str) -> None:
        """Remove an object; it may be gone already."""
        ...


def compare(store: ObjectStore, path: str, data: bytes) -> None:
    """See that the object that is there is ours.

    Raises:
        RunError: it is another one.
    """
    found = store.read(path)
    if found is not None and found[0] != data:
        raise RunError(
            f"{store.title}/{path} is there already with other content ({checksum(found[0])}; ours"
            f" {checksum(data)}): another process writes as the same client of this run"
        )


class Directory:
    """Objects as files of a folder, on any file system that several machines share.

    Metadata lie beside an object, in ``<name>.about``, which is written first.
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
            for file, content in ((_about(target), described), (target, data)):
                if not _create_file(file, content) and file.read_bytes() != content:
                    compare(self, path, data)
                    raise RunError(
                        f"{self.title}/{path} is described otherwise already: another process"
                        " writes as the same client of this run"
                    )
        except OSError as error:
            raise RunError(f"cannot write {self.title}/{path}: {error.strerror}") from error

    def read(self, path: str) -> tuple[bytes, Metadata] | None:
        file = self._root / path
        try:
            data = file.read_bytes()
            metadata = json.loads(_about(file).read_bytes())
        except FileNotFoundError:
            return None
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


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.about")


def _create_file(path: Path, data: bytes) -> bool:
    """Write a file that is not there, whole or not at all; say whether it was us."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)  # unlike a rename, it fails if the name is taken
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True
