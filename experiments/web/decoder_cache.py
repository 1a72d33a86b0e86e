"""Decoders that were made before, in the cache directory: one file for each front, made once.

A file is a line of JSON, with the figures and the SHA-256 of what follows, and an ONNX file. One
that is damaged is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.web.decoder import Made
from sfl import __version__
from sfl.files.atomic import write_file
from sfl.interactive.run import Run
from sfl.model.structure import weights_checksum
from sfl.trained.export import back_checksum

_FOLDER, _DIGEST = "decoders", "sha256"


def made_once(
    folder: Path, run: Run, client: int | None, steps: int, make: Callable[[], Made]
) -> Made:
    """Return the decoder for a run's front from the cache directory; else make it, and keep it.

    Raises:
        SflError: as ``make``; the front does not lie on this machine.
    """
    path = folder / _FOLDER / f"{_key(run, client, steps)}.decoder"
    if (kept := _read(path)) is not None:
        return kept
    made = make()
    with contextlib.suppress(OSError):  # it is made again at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, _packed(made))
    return made


def _key(run: Run, client: int | None, steps: int) -> str:
    """Return a name for all that a decoder depends on."""
    front = weights_checksum(run.front(client=client).state_dict())
    known = [__version__, torch.__version__, run.config.run, run.config.dataset, run.config.seed]
    named = [*known, run.last_round(), front, back_checksum(run), steps]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _packed(made: Made) -> bytes:
    figures = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "data"}
    head = figures | {_DIGEST: hashlib.sha256(made.data).hexdigest()}
    return json.dumps(head).encode() + b"\n" + made.data


def _read(path: Path) -> Made | None:
    """Return a decoder that was kept; None if there is none, or it is damaged."""
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        figures = json.loads(head)
        digest = figures.pop(_DIGEST)
        return Made(data, **figures) if digest == hashlib.sha256(data).hexdigest() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
