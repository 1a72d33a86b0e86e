"""Weights that runs left, and whether two runs left the same."""

import re
from pathlib import Path

import torch

from experiments.support.same_run import compare


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every model file of a run."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted((run / "models").glob("*.pt"))
        for name, tensor in torch.load(path, weights_only=True).items()
    }


def assert_equal(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], at_least: int = 11
) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) >= at_least
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def all_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every model file of server and clients."""
    found = weights(run)
    for client in sorted((run.parent.parent / "client" / run.name).glob("client_*/models")):
        found |= {f"own/{name}": tensor for name, tensor in weights(client.parent).items()}
    return found


def joined(run: Path, round_index: int = 1, kind: str = "") -> dict[str, torch.Tensor]:
    """Return the whole model after a round, from as many files of segments as there are.

    ``round_index``: -1 is before the first. ``kind``: the beginning of their names; else those of
    segments that are shared.
    """
    names = rf"{kind}(_\D.*)?" if kind else r"(client|server)_[a-z]\w*"
    last = "init" if round_index < 0 else f"{round_index:03d}"
    wanted = re.compile(rf"{names}_{last}\.pt")
    files = [path for path in sorted((run / "models").glob("*.pt")) if wanted.fullmatch(path.name)]
    states = [torch.load(file, weights_only=True) for file in files if "optim" not in file.name]
    return {name: tensor for state in states for name, tensor in state.items()}


def assert_same(whole: Path, other: Path) -> None:
    assert compare(whole, other).lines == []
