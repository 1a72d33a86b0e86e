"""A task is one row: what is predicted, its loss and figures; nothing else knows of them."""

import csv
import re
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.task import TASKS
from sfl.runtime.preflight import check_run
from sfl.strategy.recipe import Recipe
from tests.support.regression import REGRESSION
from tests.support.simulations import simulated

PACKAGE = Path(__file__).parent.parent / "sfl"


@pytest.mark.parametrize("scheme", ["sflv2", "fl", "sync-sgd"])
def test_another_task_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setitem(TASKS, "regression", REGRESSION)
    options = {"task": "regression", "model": "tests.support.regression:one_number", "cut": 2}
    run = simulated(tmp_path, scheme=scheme, batch_size=200, **options)
    with open(run / "rounds.csv") as file:
        last = list(csv.DictReader(file))[-1]
    metrics = [name for name in last if re.match("(train|val|test)_", name)]
    parts = ("train", "val", "test")
    assert metrics == [f"{p}_{n}" for p in parts for n in ("loss", "share_near", "share_around")]
    for part in parts:
        assert 0 < float(last[f"{part}_share_near"]) < float(last[f"{part}_share_around"]) < 1
        assert 1 < float(last[f"{part}_loss"]) < 30
    assert "test share of near guesses " in (run / "server_log.txt").read_text()
    holder = tmp_path / "client/r/client_0" if scheme != "sflv2" else run
    kept = torch.load(holder / "predictions/client_0_001.pt", weights_only=True)
    assert kept["guesses"].shape == (len(kept["labels"]), 1)


def test_an_unknown_task_is_one_line() -> None:
    with pytest.raises(ConfigError, match="unknown task 'classifcation'; did you mean classif"):
        check_run(RunConfig(task="classifcation"))


def test_a_model_that_ends_in_other_outputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted are 10 logits for each"):
        check_run(RunConfig(model="tests.support.regression:one_number", cut=2))


def test_nothing_else_knows_how_classes_are_counted() -> None:
    known = {"classification.py", "task.py"}
    words = re.compile(r"cross_entropy|argmax|logits|accuracy|\bhits\b|_acc\b|\"(acc|correct)\"")
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in known]
    assert [path.name for path in files if words.search(path.read_text())] == []


def test_the_task_travels_with_the_recipe() -> None:
    recipe = Recipe.of(RunConfig())
    assert recipe.task is recipe.training.task is TASKS[recipe.run.task]
