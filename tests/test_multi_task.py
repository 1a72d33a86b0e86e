"""Several servers with a task each: equal to one network with several heads, from any kill."""

from pathlib import Path

import pytest

from sfl.config import RunConfig
from tests.support.launch import Launcher, options_of
from tests.support.parties import SERVER, Chain, follower_folders, replayed, weights_of_all
from tests.support.plain_tasks import PlainTasks, states_of
from tests.support.runs import ALLOW, BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal

MODEL = {"model": BN_DROPOUT, "cut": 6, "batch_size": 200, "topology": "multi-task"}
TWO, THREE = {"tasks": "digit,parity"}, {"tasks": "class,digit,parity"}
JOINED = {"topology": "vertical-multi-task", "partition": "vertical", "label_client": 1}


# Exactness


@pytest.mark.parametrize(("state", "weights"), [("keep", "1,0.3,2"), ("reset", "")])
def test_all_servers_together_equal_one_network_with_several_heads(
    tmp_path: Path, state: str, weights: str
) -> None:
    options = MODEL | THREE | {"clients": 1, "task_weights": weights, "optimizer_state": state}
    run = simulated(tmp_path, **options)
    plain = PlainTasks(RunConfig(**options, rounds=2))
    plain.train()
    for ours, theirs in zip(states_of(run, plain.run.tasks), plain.states(), strict=True):
        assert_equal(ours, theirs, at_least=7)


KILLS = [
    (
        "alone",
        "sflv1",
        "keep",
        {"client_0": "front.after_update:3", "task_parity": "average.after:1"},
    ),
    ("alone", "sflv2", "reset", {"task_parity": "step.after_answer:5"}),
    ("alone", "sl", "keep", {"task_parity": "step.after_update:7", SERVER: "validation.after:1"}),
    (
        "joined",
        "sflv3",
        "reset",
        {"client_1": "trained.before_said:1", "task_parity": "checkpoint.before_rename:2"},
    ),
    ("joined", "sflv1", "keep", {SERVER: "step.after_update:4"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "scheme", "state", "crashes"), KILLS)
def test_killed_parties_leave_the_weights_of_one_process(
    launcher: Launcher,
    tmp_path: Path,
    clients: str,
    scheme: str,
    state: str,
    crashes: dict[str, str],
) -> None:
    options = MODEL | TWO | (JOINED if clients == "joined" else {})
    options |= {"clients": 2, "scheme": scheme, "optimizer_state": state}
    whole = simulated(tmp_path / "whole", **options, keep_tensors="all")
    of_server = [*options_of(options), "--rounds", 2, "--run", "r"]
    launcher.transport = "wss" if scheme == "sl" else "tcp"
    run = Chain(launcher, 0, 2, of_server, ALLOW, tasks=["parity"]).run(crashes)
    assert_equal(weights_of_all(run), weights_of_all(whole))
    for folder in (run, *follower_folders(run)):
        checked, models = replayed(folder, BN_DROPOUT)
        assert (checked, models >= 2) == (64 if clients == "joined" else 32, True)
