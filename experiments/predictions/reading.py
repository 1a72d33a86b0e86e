"""The labels and logits of the test set that a run kept after its last round."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import sfl
from sfl.errors import RunError
from sfl.reports.gathered import tested


class Predictions(NamedTuple):
    """What a model takes samples for, and what they are."""

    labels: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, classes) float64
    classes: Sequence[str]


def read_predictions(
    run_dir: Path, client_folders: Sequence[Path] = (), allow_import: str = ""
) -> Predictions:
    """Return the predictions of the last round's test.

    Raises:
        RunError: predictions are missing.
        IntegrityError: a file is damaged.
    """
    run = sfl.open_run(run_dir, clients=client_folders, allow_import=allow_import)
    kept = [run.predictions(client) for client in tested(run)]
    if not kept:
        raise RunError(f"{run_dir} has no predictions: no test set was evaluated")
    labels = torch.cat([both["labels"] for both in kept])
    logits = torch.cat([both["logits"] for both in kept])
    return Predictions(labels.numpy(), logits.double().softmax(1).numpy(), run.classes)
