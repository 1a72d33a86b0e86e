"""Metrics of evaluated samples equal scikit-learn's; a client's word for them is checked."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

import sfl.archive
from sfl.archive.round_log import read_round, read_summary
from sfl.config import RunConfig
from sfl.errors import ConfigError, ProtocolError
from sfl.model.classification import checked_classes
from sfl.model.metrics import Tally, add_up
from sfl.model.task import TASKS
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal

TASK = TASKS["classification"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 8), st.integers(1, 8))
def test_metrics_are_scikit_learns(seed: int, count: int, classes: int, present: int) -> None:
    drawn = np.random.default_rng(seed)
    y = torch.from_numpy(drawn.integers(0, min(present, classes), count))
    logits = torch.from_numpy(drawn.normal(size=(count, classes)).astype(np.float32))
    halves = slice(0, count // 2), slice(count // 2, count)
    figures = TASK.figures(add_up(TASK.tally(logits[h], y[h]) for h in halves), "val")
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
    assert checked_classes(GOOD, [3], 5, 3).tolist() == GOOD
    with pytest.raises(ProtocolError, match="no counts of 5 samples by 3 classes"):
        checked_classes(rows, [3], 5, 3)


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
        own = TASK.figures(TASK.tally(both["logits"], both["labels"]), "test")
        for name in TASK.evaluated:
            recorded = figures[k, "client_model_001.pt", f"test_{name}"]
            assert abs(recorded - own[f"test_{name}"]) < 1e-6, name
        ys.append(both["labels"])
        logits.append(both["logits"])
    overall = TASK.figures(TASK.tally(torch.cat(logits), torch.cat(ys)), "test")
    lines = (run / "rounds.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert all(abs(float(last[f"test_{n}"]) - overall[f"test_{n}"]) < 1e-6 for n in TASK.evaluated)


@pytest.mark.parametrize("scheme", ["sflv1", "fl"])
def test_the_test_set_is_evaluated_every_nth_round_as_well(tmp_path: Path, scheme: str) -> None:
    options = {"scheme": scheme, "model": "mlp", "rounds": 5, "clients": 2, "batch_size": 400}
    plain = simulated(tmp_path / "plain", **options)
    tested = simulated(tmp_path / "tested", **options, test_every=2)

    def column(run: Path, name: str) -> list[str]:
        return [row[name] for row in read_summary((run / "rounds.csv").read_bytes())]

    assert [bool(value) for value in column(plain, "test_acc")] == [False] * 4 + [True]
    assert [bool(value) for value in column(tested, "test_acc")] == [False, True, False, True, True]
    assert column(plain, "test_acc")[4] == column(tested, "test_acc")[4]
    assert column(plain, "val_loss") == column(tested, "val_loss")
    assert_equal(all_weights(plain), all_weights(tested))
    own = read_round((tested / "rounds/round_001.csv").read_bytes())
    assert (0, "client_model_001.pt", "test_macro_f1") in own
    with pytest.raises(ConfigError, match="--test-every -1: must be 0 or more"):
        RunConfig(test_every=-1).check()


def test_a_rounds_file_tells_round_and_step(tmp_path: Path) -> None:
    """And a file of an earlier version, without these columns, is read all the same."""
    run = simulated(tmp_path, scheme="sflv2", model="mlp", batch_size=500)
    log = (run / "rounds/round_001.csv").read_bytes()
    header, *rows = csv.reader(log.decode().splitlines())
    assert header == ["client", "file", "metric", "value", "round", "step"]
    steps = [row for row in rows if row[1].startswith("labels_")]
    assert {tuple(row[4:]) for row in steps} == {("1", str(step)) for step in range(3)}
    assert all(row[1] == f"labels_{row[4]}_{row[5]}.pt" for row in steps)
    assert {tuple(row[4:]) for row in rows if row not in steps} == {("1", "")}
    older = "".join(",".join(row[:4]) + "\n" for row in [header, *rows])
    assert read_round(older.encode()) == read_round(log)


def test_a_client_without_samples_takes_nothing_from_the_others() -> None:
    counted = TASK.tally(torch.eye(3), torch.tensor([0, 1, 1]))
    both = TASK.figures(add_up([counted, Tally()]), "val")
    assert both == TASK.figures(counted, "val")
    assert "val_macro_f1" in both
    assert TASK.figures(add_up([Tally(), Tally()]), "val") == {}
