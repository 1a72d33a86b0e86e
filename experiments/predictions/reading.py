"""The labels and logits of the test set that a run kept after its last round."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import sfl.archive
from sfl.archive.layout import MANIFEST, PREDICTIONS, model_path
from sfl.errors import RunError
from sfl.files.torch_file import TensorSpec


class Predictions(NamedTuple):
    """What a model takes samples for, and what they are."""

    labels: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, classes) float64
    classes: Sequence[str]


def read_predictions(run_dir: Path, client_folders: Sequence[Path] = ()) -> Predictions:
    """Return the predictions of the last round's test.

    Raises:
        RunError: predictions are missing.
        IntegrityError: a file is damaged.
    """
    run = sfl.archive.open(run_dir)
    data, last = run.environment()["data"], run.last_round
    beside = run_dir.resolve().parent.parent / "client" / run_dir.resolve().name
    holders = [run_dir, *client_folders, *sorted(beside.glob("client_*"))]
    archives = [sfl.archive.open(f) for f in holders if (f / MANIFEST).is_file()]
    labels, probabilities, missing = [], [], []
    for client, counts in data["num_samples"].items():
        path, count = model_path(PREDICTIONS, last, client=client), counts["test"]
        holder = next((archive for archive in archives if archive.lists(path)), None)
        if holder is None:
            missing += [f"client_{client}"] if count else []
            continue
        spec = {
            "labels": TensorSpec((count,), torch.int64),
            "logits": TensorSpec((count, len(data["classes"])), torch.float32),
        }
        both = holder.state(path, spec)
        labels.append(both["labels"])
        probabilities.append(both["logits"].double().softmax(1))
    if missing or not labels:
        raise RunError(
            f"no predictions of {', '.join(missing) or 'any client'} after round {last + 1}: where"
            " clients hold the whole model, give their folders with --clients"
        )
    y, p = torch.cat(labels).numpy(), torch.cat(probabilities).numpy()
    return Predictions(y, p, data["classes"])
