"""What is drawn from a run's predictions, and the field's cost table."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from experiments.measure.pass_cost import cost_of_a_pass
from experiments.predictions.figures import (
    ROC,
    draw_all,
    draw_confusion,
    draw_curves,
    write_classes,
)
from experiments.predictions.reading import Predictions, read_predictions
from sfl.errors import RunError
from tests.support.programs import run_program
from tests.support.simulations import simulated

PICTURES = ("confusion.png", "roc.png", "precision_recall.png")


@pytest.mark.slow
def test_the_table_of_classes_is_that_of_the_predictions(tmp_path: Path) -> None:
    run_dir = simulated(tmp_path, model="mlp", partition="dirichlet:0.3")
    names = [path.name for path in draw_all(run_dir)]
    assert names == ["classes.csv", *PICTURES]
    for name in PICTURES:
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    kept = [
        torch.load(run_dir / f"predictions/client_{k}_001.pt", weights_only=True) for k in range(3)
    ]
    y = torch.cat([both["labels"] for both in kept]).numpy()
    p = torch.cat([both["logits"] for both in kept]).softmax(1).numpy()
    assert len(y) == 1000
    rows = list(csv.DictReader((run_dir / "classes.csv").read_text().splitlines()))
    assert [int(row["samples"]) for row in rows] == [100] * 10
    recalls = recall_score(y, p.argmax(1), average=None)
    assert np.allclose([float(row["recall"]) for row in rows], recalls)
    for k, row in enumerate(rows):
        assert abs(float(row["roc_auc"]) - roc_auc_score(y == k, p[:, k])) < 1e-5
        wanted = average_precision_score(y == k, p[:, k])
        assert abs(float(row["average_precision"]) - wanted) < 1e-5


def test_predictions_of_clients_are_found_or_asked_for(tmp_path: Path) -> None:
    run_dir = simulated(tmp_path, model="mlp", scheme="fl")
    labels, probabilities, classes = read_predictions(run_dir)
    assert (len(labels), probabilities.shape, len(classes)) == (1000, (1000, 10), 10)
    assert np.allclose(probabilities.sum(1), 1)
    elsewhere = [tmp_path / f"brought_{k}" for k in range(3)]
    for k, folder in enumerate(elsewhere):
        shutil.move(tmp_path / "client/r" / f"client_{k}", folder)
    with pytest.raises(RunError, match=r"lies at client_0, in the folder .* --clients FOLDER"):
        read_predictions(run_dir)
    again, _, _ = read_predictions(run_dir, elsewhere)
    assert (again == labels).all()


@pytest.mark.slow
def test_many_classes_of_which_some_do_not_occur(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    names = [f"class {k}" for k in range(62)]
    labels, probabilities = drawn.integers(0, 50, 300), drawn.dirichlet(np.ones(62), 300)
    predictions = Predictions(labels, probabilities, names)
    write_classes(tmp_path / "c.csv", predictions)
    assert (tmp_path / "c.csv").read_text().splitlines()[-1] == "class 61,0,0.0,0.0,0.0,,"
    draw_confusion(tmp_path / "c.png", "many", predictions)
    draw_curves(tmp_path / "r.png", "many", predictions, ROC)
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_the_cost_of_a_pass_is_counted() -> None:
    """A perceptron for 32x32 colour images, on paper."""
    whole = cost_of_a_pass("mlp", 3, 10, "fl", samples=50, batch_size=32)
    parameters = 3073 * 128 + 129 * 64 + 65 * 10
    assert whole.flops == 50 * (4 * 3072 * 128 + 6 * (128 * 64 + 64 * 10))
    assert 8 * parameters < whole.num_bytes < 8 * parameters * 1.01
    split = cost_of_a_pass("mlp", 3, 10, "sl", samples=50, batch_size=32)
    assert split.flops == 50 * 4 * 3072 * 128
    tensors = 8 * 3073 * 128 + 50 * (2 * 4 * 128 + 8)
    assert tensors < split.num_bytes < tensors * 1.01


@pytest.mark.slow
def test_the_cost_table_has_the_published_beside_the_counted() -> None:
    out = run_program("-m", "experiments.measure.client_cost").stdout
    rows = re.findall(r"^\| (large-batch SGD|federated learning|split learning) \|(.*)$", out, re.M)
    assert len(rows) == 9
    cells = [[cell.strip() for cell in row.split("|")] for _, row in rows]
    assert [row[1] for row in cells[:6]] == ["29.4", "29.4", "0.1548", "13", "3", "6"]
    assert [row[4] for row in cells[:6]] == ["5.89", "5.89", "0.03", "14", "2.4", "1.2"]
    for row in cells[:3]:  # a client of 500 has a fifth of the work of one of 100
        assert abs(float(row[0]) / float(row[3]) - 5) < 0.01
    assert "Assumed:" in out
    bad = run_program("-m", "experiments.measure.client_cost", "--clients", "0,5", code=2).stderr
    assert "give numbers from 1 to 50000" in bad
