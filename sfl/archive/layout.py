"""Where everything lies in a run's folder: all names of files."""

import functools
import re
from pathlib import Path

from sfl.values import Position

# Where a run's weights lie in its folder; {round} counts from 0, "init" is before round 0.
SHARED_MODEL = "models/{name}_{round}.pt"  # what everyone goes on from, of a segment
ONE_CLIENT_MODEL = "models/client_{client}{mark}_{round}.pt"
SERVER_OPTIMIZER = "models/server_optimizer_{back}{mark}_{round}.pt"
CLIENT_OPTIMIZER = "models/client_optimizer_{client}{mark}_{round}.pt"
MEMORY = "models/aggregation_{segment}_{round}.pt"
PREDICTIONS = "predictions/client_{client}_{round}.pt"  # on its test set
# segment -> {name} and {mark} in its paths; the first of each party needs no mark
SEGMENT_NAMES = {
    "front": ("client_model", ""),
    "back": ("server_model", ""),
    "head": ("client_head", "_head"),
}


def segment_path(template: str, segment: str, round_index: int, **which: int) -> str:
    """Return the path of a file of a segment after a round; -1 stands for before the first."""
    name, mark = SEGMENT_NAMES[segment]
    which_segment = {"segment": segment, "name": name, "mark": mark}
    return model_path(template, round_index, **which_segment, **which)


def model_path(template: str, round_index: int, **which: int | str) -> str:
    """Return the path of a file that belongs to a round, as ``segment_path``."""
    name = "init" if round_index < 0 else f"{round_index:03d}"
    return template.format(round=name, **which)


MANIFEST = "manifest.jsonl"
MODELS = "models/"  # where a run's weights lie
LABELS, ACTIVATIONS, GRADS = "labels", "split_layer_tensor", "grads"
WEIGHT_GRADS = "weight_grads"
TENSOR_KINDS = (LABELS, ACTIVATIONS, GRADS)  # of a step over a cut; else it has WEIGHT_GRADS alone


def tensor_name(kind: str, at: Position) -> str:
    """Return the name of a tensor's file; at the model's first cut it does not name the cut."""
    link = f"_{at.link}" if at.link else ""
    return f"{kind}_{at.round}_{at.step}{link}.pt"


@functools.lru_cache(maxsize=1024)  # two for each step
def client_folder(root: Path, client: int, round_index: int) -> Path:
    """Return where a client's tensors of a round lie."""
    return root / "client_files" / f"client_{client}" / f"round_{round_index:03d}"


def round_of_folder(folder: Path) -> tuple[int, int] | None:
    """Return the client and the round whose tensors lie in a folder; None if none do."""
    place = re.fullmatch(r"client_(\d+)/round_(\d+)", "/".join(folder.parts[-2:]))
    return (int(place[1]), int(place[2])) if place else None
