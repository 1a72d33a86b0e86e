"""Own data of two clients about the same people, which both know in part: images, and a table."""

from pathlib import Path

import numpy as np

from tests.support.made_data import loaded

OWN = {"topology": "vertical", "partition": "own", "clients": 2, "party_models": "lenet5,mlp"}
OWN |= {"model": "lenet5", "rounds": 2, "batch_size": 100}


def write_own(folder: Path, ids: list[int], **arrays: np.ndarray) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "data.npz", ids=np.array([f"patient {i}" for i in ids]), **arrays)


def some_digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    train, _ = loaded("mnist-5k")
    return train.x[:count].numpy(), train.y[:count].numpy()


def write_hospitals(folder: Path) -> Path:
    """Write images and labels of two kinds for client 0, and a table for client 1."""
    x, y = some_digits(900)
    drawn = np.random.default_rng(0)
    here, there = drawn.permutation(900)[:700], drawn.permutation(900)[:800]
    table = x.reshape(900, -1)[:, ::7].astype(np.float32) / 128 - 1
    labels = {"y": y[here], "y_age": np.array(["young", "old"])[y[here] % 2]}
    write_own(folder / "client_0", here.tolist(), x=x[here], **labels)
    write_own(folder / "client_1", there.tolist(), x=table[there])
    return folder
