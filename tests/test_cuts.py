"""The page on which a researcher chooses a cut."""

import csv
from pathlib import Path
from typing import Any

import pytest

from experiments.cuts.cost_of_cuts import lists_of_cuts
from experiments.support.costs import costs_of
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.topology import Holder
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from tests.support.programs import run_program

IMAGE = (1, 28, 28)


def test_the_counts_of_a_perceptron_are_those_on_paper() -> None:
    split = SplitModel(Recipe.of(RunConfig(model="mlp", cut=3)), IMAGE, 10)
    front, back = costs_of(split, *Holder).values()
    assert (front.parameters, back.parameters) == (785 * 128, 129 * 64 + 65 * 10)
    assert (front.forward_flops, back.forward_flops) == (2 * 784 * 128, 2 * (128 * 64 + 64 * 10))
    # Backward: of the weights in both halves, of the input in all layers but the first.
    assert front.training_flops == 2 * front.forward_flops
    assert back.training_flops == 3 * back.forward_flops


@pytest.mark.slow
@pytest.mark.parametrize("cut", [None, "3,9"])
def test_all_segments_together_cost_what_the_whole_costs(cut: str | None) -> None:
    whole = SplitModel(Recipe.of(RunConfig(model="resnet18", scheme="fl")), (3, 32, 32), 10)
    (all_of_it,) = costs_of(whole, *Holder).values()
    split = SplitModel(Recipe.of(RunConfig(model="resnet18", cut=cut)), (3, 32, 32), 10)
    costs = costs_of(split, *Holder).values()
    assert sum(cost.parameters for cost in costs) == all_of_it.parameters
    assert sum(cost.training_flops for cost in costs) == all_of_it.training_flops


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
    labels = {int(row["step_bytes_up"]) - int(row["step_bytes_down"]) for row in rows}
    assert labels == {32 * 8}
    assert " *" in out


@pytest.mark.slow
def test_several_cuts_are_counted_by_link_and_by_party(tmp_path: Path) -> None:
    """Of the MLP 784-128-64-10: the client has what is in front of block 3 and behind block 5."""
    options = ("--model", "mlp", "--cut", "3,5", "--batch-size", 8, "--out", tmp_path)
    out = run_program("-m", "experiments.cuts", *options).stdout
    (row,) = csv.DictReader((tmp_path / "cuts.csv").read_text().splitlines())
    assert (row["cut"], row["last_block"]) == ("3,5", "relu1,relu2")
    own = int(row["client_parameters"]), int(row["server_parameters"])
    assert own == (785 * 128 + 65 * 10, 129 * 64)
    client, server = 4 * 784 * 128 + 6 * 64 * 10, 6 * 128 * 64
    assert row["client_training_flops"] == str(client)
    assert float(row["client_share"]) == client / (client + server)
    assert (row["smashed_bytes"], row["smashed_bytes_1"]) == ("512", "256")
    assert row["step_bytes_up"] == row["step_bytes_down"] == str(8 * (512 + 256))  # and no label
    header, values = out.splitlines()[2:4]
    assert header.split()[5:9] == ["0", "up", "1", "down"]
    assert values.split()[:4] == ["3", "relu1,", "5", "relu2"]


@pytest.mark.parametrize(
    ("options", "num_cuts", "wanted"),
    [
        ({}, None, [(1,), (2,), (3,)]),
        ({"topology": "u-shaped"}, None, [(1, 2), (1, 3), (2, 3)]),
        ({}, 3, [(1, 2, 3)]),
        ({"cut": "1,3"}, None, [(1, 3)]),
        ({"cut": 3}, 2, "give one of them"),
        ({"cut": 3, "topology": "u-shaped"}, None, "u-shaped takes 2 cuts; --cut 3 has 1"),
        ({"topology": "vertical"}, None, "each client, or task, has a model of its own"),
        ({"topology": "multi-hop"}, None, "clients and server alone"),
        ({"topology": "vanilla"}, 2, "vanilla takes 1 cut; --cut 1,2 has 2"),
        ({}, 4, "has 4 blocks: 4 cuts do not fit"),
    ],
)
def test_the_lists_of_cuts_that_are_measured(
    options: dict[str, Any], num_cuts: int | None, wanted: list[tuple[int, ...]] | str
) -> None:
    if isinstance(wanted, list):
        assert lists_of_cuts(RunConfig(**options), num_cuts, num_blocks=4) == wanted
    else:
        with pytest.raises(ConfigError, match=wanted):
            lists_of_cuts(RunConfig(**options), num_cuts, num_blocks=4)


def test_more_lists_than_can_be_measured_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are 9,880 ways to cut it 3 times"):
        lists_of_cuts(RunConfig(), 3, num_blocks=41)
