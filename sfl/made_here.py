"""Which of a user's own functions a run may import again: those that it was started with here.

A run's folder may come from somebody else, and what its options name is then not to be imported.
So a run that is started on this machine gets a file that shows so: each name with its HMAC under a
secret that only this user has. Without it, ``--allow-import`` says what may be imported.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from sfl.config import NodeConfig
from sfl.plain_file import read_plain

NAME = "made_here"
SECRET_BYTES = 32


def _secret(*, make: bool) -> bytes | None:
    """Return this user's secret on this machine; None if there is none, and none can be made."""
    path = NodeConfig().cache_path / "made_here.key"
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
            with contextlib.suppress(FileExistsError):  # another process was quicker
                os.link(partial, path)
            partial.unlink()
        found = read_plain(path)
        is_ours = path.stat().st_mode & 0o077 == 0
    except OSError:
        return None
    return found if is_ours and len(found) == SECRET_BYTES else None


def _proof(secret: bytes, name: str) -> str:
    return hmac.new(secret, f"SFL import {name}".encode(), hashlib.sha256).hexdigest()


def mark(folder: Path, names: Iterable[str]) -> None:
    """Note in a run's folder which functions it was started with, of those that are imported."""
    own = [name for name in names if ":" in name]
    if own and (secret := _secret(make=True)):
        lines = (f"{_proof(secret, name)} {name}\n" for name in own)
        (folder / NAME).write_text("".join(lines))


def may_import(folder: Path) -> frozenset[str]:
    """Return the functions that a run was started with on this machine, by this user."""
    secret = _secret(make=False)
    try:
        text = read_plain(folder / NAME).decode()
    except (OSError, UnicodeDecodeError):
        return frozenset()
    pairs = (line.partition(" ") for line in text.splitlines())
    return frozenset(
        name for proof, _, name in pairs
        if secret and hmac.compare_digest(proof.encode(), _proof(secret, name).encode())
    )  # fmt: skip
