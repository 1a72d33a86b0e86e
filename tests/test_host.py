"""--client-ids: many clients in one process."""

import signal
from pathlib import Path

import pytest

from sfl.crash import VARIABLE
from sfl.errors import ConfigError
from sfl.nodes import ClientNode
from tests.support.launch import Launcher, wait_for
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

TWO = ["--device", "cpu,cpu"]


def test_the_ids_are_read() -> None:
    assert ClientNode(client_ids="0-3").hosted == [0, 1, 2, 3]
    assert ClientNode(client_ids="7, 0-1").hosted == [7, 0, 1]
    assert ClientNode().hosted == []


@pytest.mark.parametrize("text", ["a", "3-1", "0-2,2", "-1", "1-", "0-2,", "0 - 2"])
def test_what_are_no_ids_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--client-ids"):
        ClientNode(client_ids=text).check()
    with pytest.raises(ConfigError, match="give one of them"):
        ClientNode(client_ids="0-2", client_id=1).check()


@pytest.mark.parametrize("cut", [4, pytest.param("3,9", marks=pytest.mark.slow)])
def test_hosted_clients_compute_what_processes_of_their_own_would(
    launcher: Launcher, tmp_path: Path, cut: int | str
) -> None:
    """With dropout, which draws from the one generator that they share; spread over devices."""
    options = ["--model", BN_DROPOUT, "--cut", cut, "--rounds", 2, "--batch-size", 64, *TWO]
    server = launcher.server("--clients", 4, "--run", "r", *options, "--keep-tensors", "none")
    allow = ["--allow-import", BN_DROPOUT]
    hosts = [
        launcher.client("--client-ids", "0-2", *allow, *TWO),
        launcher.client("--client-id", 3, *allow),
    ]
    for program in [server, *hosts]:
        program.ended_with(0)
    expected = simulated(tmp_path / "simulated", model=BN_DROPOUT, cut=cut, clients=4)
    assert_equal(weights(tmp_path / "server" / "r"), weights(expected))
    for client in range(3):
        log = tmp_path / f"client/r/client_{client}/client_log.txt"
        assert "round 2/2: own training loss" in log.read_text()
    assert "own training loss" not in hosts[0].out


@pytest.mark.slow
def test_a_host_that_is_killed_may_come_back(launcher: Launcher, tmp_path: Path) -> None:
    server = launcher.server("--clients", 3, "--run", "r", "--model", "mlp", "--rounds", 3,
                             "--batch-size", 64, "--keep-tensors", "none")  # fmt: skip
    crash = {VARIABLE: "front.after_update:20"}
    killed = launcher.client("--client-ids", "0-1", env=crash)
    other = launcher.client("--client-id", 2)
    assert killed.wait() == -signal.SIGKILL
    again = launcher.client("--client-ids", "0-1")
    for program in [server, other, again]:
        program.ended_with(0)
    expected = simulated(tmp_path / "simulated", model="mlp", rounds=3)
    assert_equal(weights(tmp_path / "server" / "r"), weights(expected))


@pytest.mark.slow
def test_hosted_clients_come_back_to_a_server_that_goes_on(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = ["--model", "mlp", "--rounds", 3, "--batch-size", 64, "--keep-tensors", "none"]
    crash = {VARIABLE: "step.after_answer:20"}
    killed = launcher.server("--clients", 3, "--run", "r", *options, env=crash)
    host = launcher.client("--client-ids", "0-2")
    assert killed.wait() == -signal.SIGKILL
    again = launcher.server("--resume", tmp_path / "server" / "r")
    for program in [again, host]:
        program.ended_with(0)
    expected = simulated(tmp_path / "simulated", model="mlp", rounds=3)
    assert_equal(weights(tmp_path / "server" / "r"), weights(expected))


def test_a_hosted_client_that_is_refused_does_not_keep_the_others(launcher: Launcher) -> None:
    server = launcher.server("--clients", 2, "--run", "r", "--model", "mlp", "--rounds", 1)
    host = launcher.client("--client-ids", "0-2")
    assert "--client-id 2: this run has the ids 0 to 1" in host.ended_with(1)
    server.ended_with(0)
    assert "client_2: " in host.out


def test_a_host_that_is_interrupted_takes_leave_for_all(launcher: Launcher) -> None:
    server = launcher.server("--clients", 3, "--run", "r", "--model", "mlp", "--rounds", 300)
    host = launcher.client("--client-ids", "0-2")
    wait_for(server, "round 1/300")
    host.process.terminate()
    assert "interrupted" in host.ended_with(3)
    wait_for(server, "client_2 is away")
    assert "left: interrupted" in server.out
