"""The user's own model functions that a command line of this machine has named.

The options in a run's folder may name a module to import, and the folder may come from somebody
else. So only functions that the user has started a run with are imported again, for resume and
replay; any other must be listed by ``--allow-import``.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from sfl.files.regular_files import read_plain
from sfl.nodes import NodeConfig

NAME = "trusted_imports"  # a file in the cache folder, one function a line


def _path() -> Path:
    return NodeConfig().cache_path / NAME  # independent of a program's own --cache-dir


def remember(names: Iterable[str]) -> None:
    """Note the names that are importable functions; ignore a folder that cannot be written."""
    new = [name for name in names if ":" in name and name not in remembered()]
    try:
        if new:
            _path().parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with open(os.open(_path(), flags, 0o600), "w") as file:
                file.write("".join(f"{name}\n" for name in new))
    except OSError:  # no writable home: --allow-import is then required
        return


def remembered() -> frozenset[str]:
    """Return the noted functions; none if other users can write the file."""
    try:
        if _path().stat().st_mode & 0o022:
            return frozenset()
        return frozenset(read_plain(_path()).decode().splitlines())
    except (OSError, UnicodeDecodeError):
        return frozenset()
