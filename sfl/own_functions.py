"""The user's own functions that a command line of this machine has named as model.

A run's folder may come from somebody else, and what its options name is then not to be imported.
What the user has started a run with here is: so it goes on, and is replayed, without being asked
again. Everything else, ``--allow-import`` has to list.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from sfl.files.plain import read_plain
from sfl.nodes import NodeConfig

NAME = "own_functions"  # of a file in the cache's folder: a line for each


def _path() -> Path:
    return NodeConfig().cache_path / NAME  # wherever a program's own --cache-dir is


def remember(names: Iterable[str]) -> None:
    """Note those of the names that are functions to be imported; do without if it cannot be."""
    new = [name for name in names if ":" in name and name not in remembered()]
    try:
        if new:
            _path().parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with open(os.open(_path(), flags, 0o600), "w") as file:
                file.write("".join(f"{name}\n" for name in new))
    except OSError:  # a home that cannot be written: then --allow-import is asked for
        return


def remembered() -> frozenset[str]:
    """Return the functions that have been noted, if nobody else can have noted them."""
    try:
        if _path().stat().st_mode & 0o022:
            return frozenset()
        return frozenset(read_plain(_path()).decode().splitlines())
    except (OSError, UnicodeDecodeError):
        return frozenset()
