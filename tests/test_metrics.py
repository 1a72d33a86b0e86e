"""Metrics of evaluated samples equal scikit-learn's; a client's word for them is checked."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

import sfl.archive
from sfl.archive.round_log import EVALUATED, read_round
from sfl.errors import ProtocolError
from sfl.model.metrics import Tally, add_up, checked_classes, tally
from tests.support.simulations import simulated


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 8), st.integers(1, 8))
def test_metrics_are_scikit_learns(seed: int, count: int, classes: int, present: int) -> None:
    drawn = np.random.default_rng(seed)
    y = torch.from_numpy(drawn.integers(0, min(present, classes), count))
    logits = torch.from_numpy(drawn.normal(size=(count, classes)).astype(np.float32))
    halves = slice(0, count // 2), slice(count // 2, count)
    figures = add_up(tally(logits[h], y[h]) for h in halves).figures("val")
    guessed = logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that were guessed and do not occur
        wanted = {
            "acc": accuracy_score(y, guessed),
            "balanced_acc": balanced_accuracy_score(y, guessed),
            "macro_f1": f1_score(y, guessed, average="macro", zero_division=0),
            "weighted_f1": f1_score(y, guessed, average="weighted", zero_division=0),
        }
    for name, value in wanted.items():
        assert abs(figures[f"val_{name}"] - value) < 1e-12, name
    loss = torch.nn.functional.cross_entropy(logits, y).item()
    assert abs(figures["val_loss"] - loss) < 1e-5


GOOD = [[3, 2, 0], [1, 2, 2], [1, 2, 0]]


@pytest.mark.parametrize(
    "rows",
    [
        GOOD[:2],
        [[3, 2], [1, 4], [1, 2]],
        [[3, 2, 1], *GOOD[1:]],
        [*GOOD[:2], [0, 2, 1]],
        [*GOOD[:2], [2, 1, 0]],
        [[3.0, 2, 0], *GOOD[1:]],
        [[-1, 6, 0], *GOOD[1:]],
        ["abc", *GOOD[1:]],
    ],
)
def test_counts_that_cannot_be_are_refused(rows: list[object]) -> None:
    assert checked_classes(GOOD, correct=3, samples=5, classes=3).tolist() == GOOD
    with pytest.raises(ProtocolError, match="no counts of 5 samples by 3 classes"):
        checked_classes(rows, correct=3, samples=5, classes=3)


@pytest.mark.parametrize("scheme", ["sflv1", "sflv3", "fl"])
def test_metrics_of_a_run_are_those_of_its_predictions(tmp_path: Path, scheme: str) -> None:
    run = simulated(tmp_path, scheme=scheme, model="mlp", partition="dirichlet:0.3")
    figures = read_round((run / "rounds/round_001.csv").read_bytes())
    ys, logits = [], []
    for k in range(3):
        holder = tmp_path / "client/r" / f"client_{k}" if scheme == "fl" else run
        path = f"predictions/client_{k}_001.pt"
        assert sfl.archive.open(holder).lists(path)
        both = torch.load(holder / path, weights_only=True)
        assert both["logits"].shape == (len(both["labels"]), 10)
        own = tally(both["logits"], both["labels"]).figures("test")
        for name in EVALUATED:
            recorded = figures[k, "client_model_001.pt", f"test_{name}"]
            assert abs(recorded - own[f"test_{name}"]) < 1e-6, name
        ys.append(both["labels"])
        logits.append(both["logits"])
    overall = tally(torch.cat(logits), torch.cat(ys)).figures("test")
    lines = (run / "rounds.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert all(abs(float(last[f"test_{n}"]) - overall[f"test_{n}"]) < 1e-6 for n in EVALUATED)


def test_a_client_without_samples_takes_nothing_from_the_others() -> None:
    counted = tally(torch.eye(3), torch.tensor([0, 1, 1]))
    both = add_up([counted, Tally()])
    assert both.figures("val") == counted.figures("val")
    assert "val_macro_f1" in both.figures("val")
    assert add_up([Tally(), Tally()]).figures("val") == {}
