"""Numbers that overflow, and steps that cannot be computed: they end one client, and no other.

The run is then that of a simulation in which the client is away from that step on.
"""

import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.support.same_run import compare
from sfl.config import RunConfig
from sfl.errors import Damaged, NotFinite, ProtocolError, RunError, StepFailed, reason_of
from sfl.model.finite_check import check_finite
from sfl.model.segment import Segment, train_step
from sfl.model.training import Training
from sfl.runtime.access import closing_message_type
from sfl.runtime.local_network import Away
from sfl.values import Position
from sfl.wire.messages import MessageType
from tests.support import poison
from tests.support.launch import Launcher, Program, options_of, wait_for
from tests.support.runs import ALLOW, RUN, STEPS
from tests.support.simulations import reference
from tests.support.weights import assert_equal, weights

SKIP = ["--on-missing", "skip", "--round-timeout", 600]
HUGE = "tests.support.models:with_huge_layer"
BAND = "tests.support.models:refusing_large"
CUBING = "tests.support.models:cubing_large"
MASKED = "tests.support.models:masked"


def poisoned(launcher: Launcher, text: str, *options: object) -> Program:
    argv = ["--server", f"127.0.0.1:{launcher.port}", "--out", launcher.folder, *options]
    return launcher.start("client", poison.main, argv, {poison.VARIABLE: text})


def attacked(launcher: Launcher, run: dict[str, object], text: str) -> tuple[Program, Program]:
    """Run three clients, of which client 1 sends poison; the others end well."""
    allow = ["--allow-import", run["model"]] if ":" in str(run["model"]) else []
    server = launcher.server(*options_of(run), *SKIP)
    honest = [launcher.client("--client-id", k, *allow) for k in (0, 2)]
    attacker = poisoned(launcher, text, "--client-id", 1, *allow)
    for program in (server, *honest):
        program.ended_with(0)
    return server, attacker


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "message", "step"),
    [
        ("sl", "SEND_MODEL:1.-1", STEPS), ("sflv1", "SEND_MODEL:1.-1", STEPS),
        ("sflv2", "SEND_MODEL:1.-1", STEPS), ("fl", "SEND_MODEL:1.-1", STEPS),
        ("sl", "TRAINING_FEATURES:1.2", 2), ("sflv1", "TRAINING_FEATURES:1.0", 0),
        ("sflv2", "TRAINING_FEATURES:1.2", 2), ("sflv3", "TRAINING_FEATURES:1.5", 5),
        ("sync-sgd", "TRAINING_GRADS:1.2", 2), ("fl", "TRAINING_FIGURES:1.-1", STEPS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", ["keep"])
def test_poison_is_as_if_its_sender_had_left(
    launcher: Launcher, tmp_path: Path, scheme: str, message: str, step: int, state: str
) -> None:
    run = RUN | {"scheme": scheme, "optimizer_state": state, "optimizer": "adam"}
    value = "nan" if "FIGURES" in message else "3e38"
    server, attacker = attacked(launcher, run, f"{message}:{value}")
    assert re.search("squares overflow|nan counts no samples", attacker.ended_with(1))
    assert "client_1 is refused: " in server.out
    assert "going on without client_1: " in server.out
    whole = reference(tmp_path / "whole", run, [Away(1, 1, step)])
    assert compare(whole, launcher.folder / "server/r").lines == []
    rows = csv.DictReader((launcher.folder / "server/r/rounds.csv").read_text().splitlines())
    assert ["1" in row["took_part"].split(";") for row in rows] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["reject", "log"])
def test_a_loss_that_a_client_tells_of_a_step_is_checked(
    launcher: Launcher, tmp_path: Path, policy: str
) -> None:
    """Where the client computes the loss; its gradients are as they should be."""
    run = RUN | {"cut": "3,9", "rounds": 2, "on_nonfinite": policy}
    server, attacker = attacked(launcher, run, "TRAINING_GRADS:1.2:nan:told")
    away = [Away(1, 1, 2)] if policy == "reject" else []
    assert "the losses of client_1 hold NaN" in server.out
    assert ("client_1 is refused" in server.out) == bool(away)
    assert attacker.wait() == len(away)
    assert_equal(
        weights(launcher.folder / "server/r"), weights(reference(tmp_path / "whole", run, away))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "text", "why"),
    [
        (HUGE, "TRAINING_FEATURES:1.1:1e18:row", "results of step 1 of client 1"),
        (
            BAND,
            "TRAINING_FEATURES:1.1:100:row",
            "block 4 (_RefusesLarge) cannot train on a batch of 200",
        ),
    ],
)
@pytest.mark.parametrize("scheme", ["sl", "sflv2"])
def test_what_fails_in_a_step_ends_its_client(
    launcher: Launcher, tmp_path: Path, scheme: str, model: str, text: str, why: str
) -> None:
    """BatchNorm's statistics of the back, which has seen the batch, are as they were before."""
    run = RUN | {"scheme": scheme, "model": model, "cut": 2}
    server, attacker = attacked(launcher, run, text)
    assert why in attacker.ended_with(1)
    assert why in server.out
    whole = reference(tmp_path / "whole", run, [Away(1, 1, 1)])
    assert compare(whole, launcher.folder / "server/r").lines == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "model", "text"),
    [
        ("fl", "mlp", "VALIDATION_RESULT:1.-1:3e38"),
        ("sflv1", CUBING, "VALIDATION_FEATURES:1.0:1e18:row"),
    ],
)
def test_a_loss_of_an_evaluation_that_overflows_ends_its_client(
    launcher: Launcher, scheme: str, model: str, text: str
) -> None:
    """It would make the round's figures NaN."""
    cut = {} if scheme == "fl" else {"cut": 2}
    server, attacker = attacked(launcher, RUN | {"scheme": scheme, "model": model} | cut, text)
    assert "the losses of client 1's evaluation hold" in attacker.ended_with(1)
    assert "client_1 is refused: the losses of client 1's evaluation" in server.out
    rows = csv.DictReader((launcher.folder / "server/r/rounds.csv").read_text().splitlines())
    assert [0 < float(row["val_loss"]) < 100 for row in rows] == [True, True, True]


@pytest.mark.slow
def test_a_refused_client_that_is_waited_for_may_be_started_anew(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = RUN | {"clients": 2, "rounds": 2}
    server = launcher.server(*options_of(run))
    stays = launcher.client("--client-id", 0, *ALLOW)
    refused = poisoned(launcher, "TRAINING_FEATURES:0.1:nan", "--client-id", 1, *ALLOW)
    assert "the activations of client 1 hold NaN or infinity" in refused.ended_with(1)
    wait_for(stays, "waiting for a corrected client_1 (the activations of client 1 hold NaN")
    launcher.client("--client-id", 1, *ALLOW).ended_with(0)
    for program in (server, stays):
        program.ended_with(0)
    whole = reference(tmp_path / "whole", run)
    assert compare(whole, launcher.folder / "server/r").lines == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "scheme", "count"),
    [("wait", "sflv1", 1), ("wait", "fl", 2), ("skip", "sflv2", 2), ("wait", "sync-sgd", 2)],
)
def test_a_server_ends_when_each_client_would_fail_again(
    launcher: Launcher, missing: str, scheme: str, count: int
) -> None:
    run = {"model": "mlp", "batch_size": 200, "clients": count, "optimizer": "sgd", "lr": 1e8}
    server = launcher.server(*options_of(run | {"scheme": scheme}), "--on-missing", missing)
    clients = [launcher.client("--client-id", k) for k in range(count)]
    for client in clients:
        assert "a lower --lr or --clip-norm may help" in client.ended_with(1)
    line = server.ended_with(1)
    assert "no client can go on, each would fail again: " in line
    assert "a lower --lr or --clip-norm may help" in line


def test_a_client_whose_own_model_fails_is_not_waited_for(launcher: Launcher) -> None:
    model = ["--model", BAND, "--cut", 5]
    server = launcher.server("--clients", 1, "--batch-size", 200, "--lr", 1e6, *model)
    client = launcher.client("--allow-import", BAND)
    why = "block 2 (_RefusesLarge) cannot train on a batch of 200: ValueError: too large"
    assert why in client.ended_with(1)
    assert f"client_0 failed: {why}" in server.ended_with(1)


def test_a_mask_of_infinity_in_the_model_is_no_poison(launcher: Launcher) -> None:
    for cut in (1, 2):  # it lies behind the cut, then in front
        options = ["--model", MASKED, "--cut", cut, "--scheme", "sl", "--batch-size", 400]
        allow = ["--allow-import", MASKED]
        launcher.run(*options, "--rounds", 1, clients=1, client_options=allow)
        launcher.folder /= f"after_{cut}"
        launcher.folder.mkdir()


def test_a_client_that_was_away_may_be_back_in_the_next_round(tmp_path: Path) -> None:
    run = {"model": "mlp", "batch_size": 400, "clients": 3, "rounds": 3, "run": "r"}
    folder = reference(tmp_path, run, [Away(1, 1, 1, back=2)])
    rows = csv.DictReader((folder / "rounds.csv").read_text().splitlines())
    assert ["1" in row["took_part"].split(";") for row in rows] == [True, False, True]


# The arithmetic


AT = Position("r", 0, 0, 0)


def segment(*blocks: nn.Module) -> Segment:
    run = RunConfig(run="r", optimizer="adam", clip_norm=1.0)
    made = Segment(nn.Sequential(*blocks), 1, Training.of(run, (1,)), torch.device("cpu"))
    made.start_round(0)
    return made


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        raise self.error


def test_a_step_that_is_undone_leaves_no_trace() -> None:
    ours = segment(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    before = ours.state()
    train_step(ours, torch.randn(8, 4), torch.randint(3, (8,)), AT)
    assert not torch.equal(ours.state()["1.running_mean"], before["1.running_mean"])
    ours.undo_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state().items())
    assert not list(ours.gradients_in_place())


@pytest.mark.parametrize("error", [ValueError("no"), IndexError("no"), KeyError("no")])
def test_what_a_block_raises_is_a_failed_step(error: Exception) -> None:
    with pytest.raises(StepFailed, match=f"block 2 .* {type(error).__name__}: '?no"):
        segment(nn.Linear(4, 6), Raises(error)).forward(torch.randn(8, 4), AT)
    with pytest.raises(StepFailed, match="loss cannot be computed: IndexError"):
        train_step(segment(nn.Linear(4, 3)), torch.randn(2, 4), torch.tensor([0, 3]), AT)


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError()])
def test_disk_and_memory_are_the_machines_own(error: Exception) -> None:
    with pytest.raises(type(error)):
        segment(Raises(error)).forward(torch.randn(8, 4), AT)


def test_statistics_that_overflow_are_seen_where_loss_and_gradients_are_finite() -> None:
    layer = nn.Linear(4, 6)
    nn.init.constant_(layer.weight, 1e3)
    ours, z = segment(layer, nn.BatchNorm1d(6), nn.Linear(6, 3)), torch.zeros(8, 4)
    z[0] = 1e18
    figures, dz = train_step(ours, z, torch.zeros(8, dtype=torch.int64), AT)
    given = [torch.tensor(figures.loss), dz, *ours.gradients_in_place()]
    check_finite(given, "all but the statistics", "reject", print)
    with pytest.raises(NotFinite):
        check_finite(ours.statistics(), "the statistics", "reject", print)


def test_a_mask_of_infinity_is_no_statistic() -> None:
    norm = nn.BatchNorm1d(4)
    norm.register_buffer("mask", torch.tensor([-float("inf")]))
    assert len(list(segment(norm).statistics())) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFinite("x"), "FAILED"), (StepFailed("x"), "FAILED"), (KeyError("x"), "FAILED"),
        (ProtocolError("x"), "INVALID_MESSAGE"), (RunError("x"), "ABORT"),
        (OSError(28, "x"), "ABORT"), (MemoryError(), "ABORT"),
        (Damaged("x"), "UNREGISTER"), (KeyboardInterrupt(), "UNREGISTER"),
        (GeneratorExit(), "UNREGISTER"),
    ],
)  # fmt: skip
def test_a_client_tells_whether_it_would_fail_again(error: BaseException, kind: str) -> None:
    """``FAILED`` says so: a server does not wait for a client that does what it did again."""
    assert closing_message_type(error) is MessageType(kind)


def test_a_conversation_that_is_closed_was_interrupted() -> None:
    assert reason_of(GeneratorExit()) == reason_of(KeyboardInterrupt()) == "it was interrupted"
