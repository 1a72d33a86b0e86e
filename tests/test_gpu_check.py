"""experiments.gpu_check: its dry run on the CPU, and what its table says."""

import re

import pytest

from experiments.gpu_check.__main__ import Table
from experiments.gpu_check.made_images import grey, images
from experiments.gpu_check.speed import measurements
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError
from sfl.nodes import SimulationNode
from sfl.runtime.simulation import simulate
from tests.support.programs import run_program


@pytest.mark.slow
def test_a_dry_run_takes_one_check_of_each_kind() -> None:
    done = run_program("-m", "experiments.gpu_check", "--device", "cpu")
    *lines, closing = done.stdout.splitlines()
    assert closing == "3 checks and measurements, 0 NOT OK"
    same, killed, speed = lines[-3:]
    for line in (same, killed):
        assert re.search(r"\| [1-9]\d* tensors and [1-9]\d* replayed gradients, 0 differ", line)
    # Of a batch of 512: images, activations and labels go there, and gradients come back, of the
    # server; images and gradients, and activations, of the client. All float32 but the labels.
    x, z, y = 4 * 512 * 784, 4 * 512 * 128, 8 * 512
    assert f"to the device {x + 2 * z + y:,} bytes a step, from it {2 * z:,}" in speed


def test_what_differs_fails_or_comes_too_late_is_in_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> tuple[str, bool]:
        raise RunError("it has failed")

    table = Table(minutes=5)
    table.add("fine", lambda: ("0 differ", True))
    table.add("wrong", lambda: ("1 differ", False))
    table.add("failed", fails)
    assert table.closing_line() == "3 checks and measurements, 2 NOT OK"
    late = Table(minutes=0.9)
    late.add("late", fails)
    assert late.closing_line() == "0 checks and measurements, 0 NOT OK, 1 left out"
    shown = capsys.readouterr().out
    assert "| wrong | 1 differ | NOT OK |" in shown
    assert "| failed | RunError: it has failed | NOT OK |" in shown


def test_all_sizes_are_measured_on_a_device() -> None:
    rows = measurements("cuda", is_dry=False)
    assert {(m.row.model, m.row.batch_size, m.row.clients) for m in rows} == {
        (model, size, clients)
        for model, size in (("lenet5", 128), ("resnet18", 32), ("resnet18", 128))
        for clients in (1, 3)
    }
    assert {m.clients for m in rows} == {"cuda", "cpu"}
    assert len({m.title for m in rows}) == len(rows)


def test_made_images_depend_on_the_seed_alone() -> None:
    assert images((1, 28, 28), 20, seed=3).x.equal(images((1, 28, 28), 20, seed=3).x)
    assert not images((1, 28, 28), 20, seed=3).x.equal(images((1, 28, 28), 20, seed=4).x)
    assert grey().input_shape == (1, 28, 28)


def test_clients_of_a_simulation_may_compute_elsewhere() -> None:
    with pytest.raises(ConfigError, match="--device 'tpu'"):
        SimulationNode(client_device="tpu").check()
    node = SimulationNode(device="cpu", client_device="cpu,cpu,cpu,cpu")
    with pytest.raises(ConfigError, match="a simulation of 3 clients holds 3 models"):
        simulate(RunConfig(clients=3), node)
