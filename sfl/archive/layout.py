"""The layout of a run's folder: names of all its files."""

import functools
import re
from pathlib import Path

from sfl.values import Position

# Paths of a run's weights; {round} is after which round, "init" before round 0.
SHARED_MODEL = "models/{name}_{round}.pt"  # a segment that all clients, or all backs, start from
ONE_CLIENT_MODEL = "models/client_{client}{mark}_{round}.pt"
SERVER_OPTIMIZER = "models/server_optimizer_{back}{mark}_{round}.pt"
CLIENT_OPTIMIZER = "models/client_optimizer_{client}{mark}_{round}.pt"
ANY_MODEL = "models/*_{round}.pt"
MEMORY = "models/aggregation_{segment}_{round}.pt"
PREDICTIONS = "predictions/client_{client}_{round}.pt"  # on its test set


_SHARE = re.compile(r"rank_[1-9]\d{0,5}")


def names_of(segment: str) -> tuple[str, str]:
    """Return {name} and {mark} in a segment's paths; front and back have no mark."""
    first = {"front": "client_model", "back": "server_model"}
    if segment in first:
        return first[segment], ""
    of_hop = segment.startswith("hop_")
    return segment, f"_{segment if of_hop else segment.partition('_')[2]}"


def segment_path(template: str, segment: str, round_index: int, **which: int) -> str:
    """Return the path of a segment's file after a round; round -1: before the first."""
    name, mark = names_of(segment)
    which_segment = {"segment": segment, "name": name, "mark": mark}
    return model_path(template, round_index, **which_segment, **which)


def model_path(template: str, round_index: int, **which: int | str) -> str:
    """Do as ``segment_path``, for a file that belongs to no segment."""
    name = "init" if round_index < 0 else f"{round_index:03d}"
    return template.format(round=name, **which)


MANIFEST = "manifest.jsonl"
STATUS = "status.json"  # while the run goes on
TRACKED = "tracked"  # the folder of --track's files
# W&B's part of it has links; nobody reads it, and each start writes into a new folder in it.
WITH_LINKS = f"{TRACKED}/wandb"
MODELS = "models/"  # the folder of a run's weights
LABELS, ACTIVATIONS, GRADS = "labels", "split_layer_tensor", "grads"
WEIGHT_GRADS = "weight_grads"
TENSOR_KINDS = (LABELS, ACTIVATIONS, GRADS)  # of a step with a cut; without, WEIGHT_GRADS alone


def share_path(run: Path, rank: int) -> Path:
    """Return the folder of a rank's share of a run; that of rank 0 is the run's own."""
    return run / f"rank_{rank}" if rank else run


def shares_in(run: Path) -> list[Path]:
    """Return the folders of the shares that lie in a run's folder, by their ranks."""
    found = [path for path in run.glob("rank_*") if _SHARE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("_")[2]))


def tensor_name(kind: str, at: Position) -> str:
    """Return the name of a tensor's file; it contains the cut, except for the first one."""
    link = f"_{at.link}" if at.link else ""
    return f"{kind}_{at.round}_{at.step}{link}.pt"


@functools.lru_cache(maxsize=1024)  # two for each step
def client_folder(root: Path, client: int, round_index: int) -> Path:
    """Return the folder of a client's tensors of a round."""
    return root / "client_files" / f"client_{client}" / f"round_{round_index:03d}"


def round_of_folder(folder: Path) -> tuple[int, int] | None:
    """Return client and round of a folder of tensors; None for another folder."""
    place = re.fullmatch(r"client_(\d+)/round_(\d+)", "/".join(folder.parts[-2:]))
    return (int(place[1]), int(place[2])) if place else None
