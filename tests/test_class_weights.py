"""Weights of classes in the loss: what they are, and that every scheme and replay has them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from sfl.config import RunConfig
from sfl.data.client_data import batch_indices, part_of
from sfl.data.datasets import DATASETS
from sfl.errors import ConfigError, ProtocolError
from sfl.model.class_weights import class_weights
from sfl.model.zoo import build, model_spec
from sfl.runtime import replay
from sfl.runtime.preflight import check_run
from sfl.runtime.recorded_run import load
from tests.support.launch import Launcher
from tests.support.made_data import loaded
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, joined, weights

SKEWED = "dirichlet:0.2"


def test_balanced_is_scikit_learns() -> None:
    labels = np.repeat([0, 1, 2], [3, 50, 7])
    counts = [[1, 20, 0], [2, 30, 7]]  # of two clients
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert np.allclose(class_weights("balanced", 3, counts), theirs, rtol=1e-12)
    assert class_weights("balanced", 3, [[1, 0, 3]]) == (4 / 3, 0.0, 4 / 9)
    assert class_weights("none", 3, [[], []]) == ()
    assert class_weights("1,2.5,3", 3) == (1.0, 2.5, 3.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("heavy", "give none, balanced, or a number from 1e-06 to"),
        ("1,0", "a number from"),
        ("1,1e-46", "a number from"),
        ("1,nan", "a number from"),
        ("1,inf", "a number from"),
        ("1,2", "2 weights for 10 classes"),
    ],
)
def test_weights_that_make_no_sense_are_refused_before_the_start(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_run(RunConfig(class_weights=text))


def test_one_client_equals_a_plain_loop_with_a_weighted_loss(tmp_path: Path) -> None:
    options = {"model": "mlp", "clients": 1, "optimizer_state": "keep", "batch_size": 200}
    chosen = ",".join(str(1 + k / 2) for k in range(10))
    run = simulated(tmp_path, **options, class_weights=chosen)
    config = RunConfig(**options)  # type: ignore[arg-type]
    data = part_of(DATASETS["mnist-5k"], config, 0, loaded("mnist-5k"))
    model = build(model_spec("mlp"), (1, 28, 28), 10, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    loss = nn.CrossEntropyLoss(torch.tensor([1 + k / 2 for k in range(10)]))
    for round_index in range(2):
        for indices in batch_indices(len(data.train), config, round_index=round_index, client=0):
            x, y = data.batch(data.train, indices)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    assert_equal(joined(run), dict(model.state_dict()), at_least=6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sl", "sflv1", "fl", "sync-sgd"])
def test_every_scheme_weighs_over_sockets_as_in_one_process(
    launcher: Launcher, tmp_path: Path, scheme: str
) -> None:
    options = {"scheme": scheme, "model": "mlp", "partition": SKEWED, "class_weights": "balanced"}
    flags = [text for n, v in options.items() for text in (f"--{n.replace('_', '-')}", v)]
    sockets = launcher.run(*flags, "--rounds", 2, "--batch-size", 64)
    same = simulated(tmp_path / "same", **options, keep_tensors="all")
    assert_equal(weights(sockets), weights(same), at_least=6)
    without = simulated(tmp_path / "without", **options | {"class_weights": "none"})
    kept, other = (weights(run)["client_model_001.pt/fc1.weight"] for run in (same, without))
    assert not torch.equal(kept, other)
    report = replay.check(load(sockets))
    assert (report.findings, report.models_differ, report.differ) == ([], 0, 0)
    assert (
        report.models + report.checked >= {"sl": 100, "sflv1": 100, "fl": 2, "sync-sgd": 8}[scheme]
    )


def test_fl_with_weights_equals_sflv1(tmp_path: Path) -> None:
    options = {"model": "mlp", "partition": SKEWED, "class_weights": "balanced"}
    split = simulated(tmp_path / "a", scheme="sflv1", **options)
    whole = simulated(tmp_path / "b", scheme="fl", **options)
    federated = torch.load(whole / "models/client_model_001.pt", weights_only=True)
    assert_equal(joined(split), federated, at_least=6)


def test_the_server_hears_of_classes_only_if_it_weighs_by_them(tmp_path: Path) -> None:
    from sfl.conversation.report import DataReport, parse_report
    from sfl.wire.messages import Message, MessageType

    data = part_of(DATASETS["mnist-5k"], RunConfig(), 0, loaded("mnist-5k"))
    plain, balanced = RunConfig(), RunConfig(class_weights="balanced")
    assert DataReport.of(data, plain).class_counts == ()
    report = DataReport.of(data, balanced)
    assert sum(report.class_counts) == len(data.train)
    content = json.loads(json.dumps(vars(report)))
    for bad in ([], [1] * 9, [-1] * 10, [1.5] * 10, ["1"] * 10):
        message = Message(MessageType.REQUEST_TO_START, content=content | {"class_counts": bad})
        with pytest.raises(ProtocolError, match="reports no samples of each class"):
            parse_report(message, 0, balanced)
