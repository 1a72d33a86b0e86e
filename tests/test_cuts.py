"""The page on which a researcher chooses a cut."""

import csv
from pathlib import Path

import pytest

from experiments.support.costs import costs_of
from sfl.config import RunConfig
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from tests.support.programs import run_program

IMAGE = (1, 28, 28)


def test_the_counts_of_a_perceptron_are_those_on_paper() -> None:
    front, back = costs_of(SplitModel(Recipe.of(RunConfig(model="mlp", cut=3)), IMAGE, 10), IMAGE)
    assert (front.parameters, back.parameters) == (785 * 128, 129 * 64 + 65 * 10)
    assert (front.forward_flops, back.forward_flops) == (2 * 784 * 128, 2 * (128 * 64 + 64 * 10))
    # Backward: of the weights in both halves, of the input in all layers but the first.
    assert front.training_flops == 2 * front.forward_flops
    assert back.training_flops == 3 * back.forward_flops


@pytest.mark.slow
def test_both_halves_together_cost_what_the_whole_costs() -> None:
    whole = SplitModel(Recipe.of(RunConfig(model="resnet18", scheme="fl")), (3, 32, 32), 10)
    (all_of_it,) = costs_of(whole, (3, 32, 32))
    halves = costs_of(
        SplitModel(Recipe.of(RunConfig(model="resnet18")), (3, 32, 32), 10), (3, 32, 32)
    )
    assert sum(half.parameters for half in halves) == all_of_it.parameters
    assert sum(half.training_flops for half in halves) == all_of_it.training_flops


@pytest.mark.slow
def test_the_table_and_the_picture(tmp_path: Path) -> None:
    options = ("--scheme", "fl", "--model", "lenet5", "--dataset", "mnist", "--out", tmp_path)
    out = run_program("-m", "experiments.cuts", *options).stdout
    rows = list(csv.DictReader((tmp_path / "cuts.csv").read_text().splitlines()))
    assert [row["last_block"] for row in rows[:3]] == ["conv1", "relu1", "pool1"]
    assert [row["smashed_bytes"] for row in rows[:3]] == ["18816", "18816", "4704"]
    parameters = {int(r["client_parameters"]) + int(r["server_parameters"]) for r in rows}
    assert parameters == {61706}
    assert all(float(row["server_forward_ms"]) > 0 for row in rows)
    assert (tmp_path / "cuts.png").read_bytes().startswith(b"\x89PNG")
    assert " *" in out
