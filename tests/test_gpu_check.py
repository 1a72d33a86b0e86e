"""experiments.gpu_check: its dry run on the CPU, and what its table says."""

import contextlib
import os
import re
import select
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.gpu_check import waits as waits_of_steps
from experiments.gpu_check.__main__ import Table
from experiments.gpu_check.made_images import grey, images
from experiments.gpu_check.speed import sizes
from experiments.gpu_check.waits import without_other_waits
from experiments.gpu_check.worker import Worker
from sfl.config import RunConfig
from sfl.errors import ConfigError, StepFailed
from sfl.model.segment_optimizer import SegmentOptimizer
from sfl.nodes import SimulationNode
from sfl.runtime.simulation import simulate
from tests.support.bare_machine import run_bare
from tests.support.simulations import simulated


@pytest.mark.slow
def test_a_dry_run_takes_one_check_of_each_kind_with_few_packages(tmp_path: Path) -> None:
    done = run_bare(tmp_path, "-m", "experiments.gpu_check", "--device", "cpu")
    *lines, closing = done.stdout.splitlines()
    assert (closing, done.stderr) == ("5 checks and measurements, 0 NOT OK", "")
    machine, same, strict, killed, speed = lines[-5:]
    assert "device cpu" in machine
    assert "11 steps, in which nothing else was waited for" in strict
    for line in (same, killed):
        assert re.search(r"\| [1-9]\d* tensors and [1-9]\d* replayed gradients, 0 differ", line)
    # Of a batch of 512: images, activations and labels go there, and gradients come back, of the
    # server; images and gradients, and activations, of the client. All float32 but the labels.
    x, z, y = 4 * 512 * 784, 4 * 512 * 128, 8 * 512
    assert f"to the device {x + 2 * z + y:,} bytes a step, from it {2 * z:,}" in speed


@pytest.mark.slow
def test_what_differs_fails_hangs_dies_or_comes_too_late_is_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, late, short = Table(minutes=5), Table(minutes=0.9), Table(minutes=5)
    with Worker("tests.support.table_rows:rows_of_all_kinds", str(tmp_path)) as worker:
        table.fill(worker, limit_s=2)
    with Worker("tests.support.table_rows:rows_that_end") as worker:
        late.fill(worker)
    with Worker("tests.support.table_rows:rows_of_all_kinds", str(tmp_path)) as worker:
        monkeypatch.setattr(Table, "_is_late", property(lambda table: table.done == 4))
        short.fill(worker, limit_s=2)
    assert short.closing_line() == "4 checks and measurements, 3 NOT OK, 1 left out"
    assert table.closing_line() == "6 checks and measurements, 4 NOT OK"
    assert late.closing_line() == "1 checks and measurements, 1 NOT OK, 1 left out"
    shown = capsys.readouterr().out
    lines = [line.rsplit("|", 2)[0] for line in shown.splitlines()]
    assert [line for line in lines if not line.startswith(("| check ", "| --- "))] == [
        "| fine | 0 differ | ok ",
        "| wrong | 1 differ | NOT OK ",
        "| failed | RunError: it has failed | NOT OK ",
        "| hung | not over after 2 s, and killed | NOT OK ",
        "| died | its process ended with exit code 7 | NOT OK ",
        "| fine again | 0 differ | ok ",
        "| late | left out: --minutes are up | ",
        "| what was to follow | there is no GPU | NOT OK ",
        "| fine | 0 differ | ok ",
        "| wrong | 1 differ | NOT OK ",
        "| failed | RunError: it has failed | NOT OK ",
        "| hung | not over after 2 s, and killed | NOT OK ",
        "| the rest | left out: --minutes are up | ",
    ]
    hung_s = [float(s) for s in re.findall(r"killed \| NOT OK \| (.*) \|", shown)]
    assert len(hung_s) == 2
    assert all(2 <= seconds < 20 for seconds in hung_s)
    with contextlib.suppress(ProcessLookupError):  # what it has started is killed as well
        started = os.pidfd_open(int((tmp_path / "child").read_text()))
        assert select.select([started], [], [], 10)[0]


def test_a_step_that_waits_for_more_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU would show it: torch raises an error where the step waits in its strict mode."""
    modes, waits = ["default"], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(waits_of_steps, "is_gpu", lambda device: True)
    step = SegmentOptimizer.step

    def noted(optimizer: SegmentOptimizer) -> None:
        waits.append(modes[-1])
        if len(waits) == most:
            raise RuntimeError("called a synchronizing CUDA operation")
        step(optimizer)

    monkeypatch.setattr(SegmentOptimizer, "step", noted)
    options = {"model": "mlp", "rounds": 1, "clients": 1, "batch_size": 1000}
    most = 0
    seen, is_right = without_other_waits(partial(simulated, tmp_path / "fine", **options))
    assert (seen, is_right) == ("3 steps, in which nothing else was waited for", True)
    assert waits == ["default"] * 2 + ["error"] * 6
    assert modes[-1] == "default"
    waits.clear()
    most = 4
    with pytest.raises(StepFailed, match="synchronizing"):
        without_other_waits(partial(simulated, tmp_path / "waits", **options))
    assert modes[-1] == "default"


def test_all_sizes_are_measured_on_a_device() -> None:
    rows = sizes("cuda", is_dry=False)
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
