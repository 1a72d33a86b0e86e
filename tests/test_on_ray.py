"""Runs that Ray places and starts again: the same weights as ever. Each test starts one cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.support.process_tree import Tree
from tests.support.launch import OFFLINE, options_of
from tests.support.programs import ROOT, run_program
from tests.support.simulations import reference
from tests.support.weights import all_weights, assert_equal, assert_same

pytest.importorskip("ray")

# Each client has a model and an optimiser of its own, which only its folder has.
RUN: dict[str, object] = {
    "model": "mlp", "scheme": "sflv3", "optimizer_state": "keep", "clients": 2, "batch_size": 100,
    "rounds": 12, "keep_tensors": "none", "run": "r",
}  # fmt: skip
SMALL = ["--cpus-per-server", "0.5", "--cpus-per-actor", "0.3"]
KILLED = {"round 2/": "client/r/client_1/client_log.txt", "round 6/": "server/r/server_log.txt"}


def writer_of(log: Path, program: int) -> int:
    """Return the process that writes a file, of those that a program has started."""
    for pid in Tree(program).pids():
        opened = Path(f"/proc/{pid}/fd").iterdir()
        if any(Path(os.path.realpath(descriptor)) == log for descriptor in opened):
            return pid
    raise AssertionError(f"no process writes {log}")


@pytest.mark.slow
def test_actors_that_are_killed_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    options = [*options_of(RUN), "--out", tmp_path, "--port", 0, *SMALL]
    command = [sys.executable, "-m", "experiments.on_ray", *map(str, options)]
    killed, lines = dict(KILLED), []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | OFFLINE
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            lines.append(line)
            for when in [when for when in killed if line.startswith(when)]:
                log = (tmp_path / killed.pop(when)).resolve()
                os.kill(writer_of(log, program.pid), signal.SIGKILL)
    said = "".join(lines)
    assert (program.returncode, killed) == (0, {}), said
    for who in ("clients 1", "server"):
        assert f"{who}: the process has died; Ray has started it again\n" in said
    assert "client_1 is back" in said
    assert "going on with round " in said
    assert f"the run's folder is on {os.uname().nodename}, " in lines[-1]
    assert "raylet" not in said
    undisturbed = reference(tmp_path / "one", RUN)
    assert_equal(all_weights(tmp_path / "server/r"), all_weights(undisturbed), at_least=100)


@pytest.mark.slow
def test_a_comparison_on_ray_has_the_same_table_and_outlasts_a_run_that_fails(
    tmp_path: Path,
) -> None:
    common = ["--model", "mlp", "--rounds", 2, "--batch-size", 200, "--clients", 2]
    compare = ["-m", "experiments.compare", *common, "--schemes", "sl,central"]
    compare += ["--out", tmp_path / "ray", "--data-dir", tmp_path / "no data"]
    # The second cannot be downloaded.
    sweep = ["--sweep", "dataset=mnist-5k,fashion-mnist"]
    failed = run_program(*compare, *sweep, "--over", "ray", code=1)
    (line,) = failed.stderr.splitlines()[-1:]
    for scheme in ("sl", "central"):
        assert f"{scheme}-iid-dataset-fashion-mnist-0: simulate: error: FashionMNIST is" in line
        assert f"{scheme}-iid-dataset-mnist-5k-0: round 2/2: " in failed.stdout
    tables = run_program(*compare, "--sweep", "dataset=mnist-5k")
    assert "round 2/2" not in tables.stdout  # the runs were done
    lines = pd.read_csv(tmp_path / "ray/compare.csv")
    run = {"model": "mlp", "rounds": 2, "batch_size": 200, "clients": 2, "keep_tensors": "none"}
    for scheme in ("sl", "central"):
        name = f"{scheme}-iid-dataset-mnist-5k-0"
        ours = reference(tmp_path / "one", run | {"scheme": scheme, "run": name})
        assert_same(ours, tmp_path / "ray/server" / name)
        last = lines[(lines["scheme"] == scheme) & (lines["client"] == "all")].iloc[-1]
        assert last["test_acc"] == pd.read_csv(ours / "rounds.csv").iloc[-1]["test_acc"]
