"""A run whose processes mpirun has started: the same weights, and all end together."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.bench.peers.mpi import launcher as mpiexec
from sfl.crash import VARIABLE
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from tests.support.launch import OFFLINE, options_of
from tests.support.runs import ALLOW, RUN
from tests.support.simulations import reference
from tests.support.weights import assert_same

pytest.importorskip("mpi4py")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TIMEOUT_S = 240
PROGRAM = [sys.executable, "-m", "mpi4py", "run_mpi.py"]
Words = Sequence[object]


def mpirun(num: int, out: Path, *options: object, other: Words = ()) -> tuple[int, str]:
    """Run so many ranks to their end; ``other``: a program and options for the last of them."""
    own = [*PROGRAM, "--out", out, *options]
    command = [*mpiexec(num - bool(other)), *own]
    if other:
        command += [":", "-n", 1, *other, "--out", out, *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT, env={**os.environ, **OFFLINE}, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    """First a rank is two clients; then each has its own, and all end by themselves."""
    dies = ["env", f"{VARIABLE}=front.before_update:9", *PROGRAM]
    code, said = mpirun(3, tmp_path, *options_of(RUN), *ALLOW, other=dies)
    assert code != 0, said
    assert "round 1/3" in said
    assert "round 2/3" not in said
    folder = tmp_path / "server/r"
    code, said = mpirun(4, tmp_path, "--resume", folder, *ALLOW)
    assert code == 0, said
    assert_same(reference(tmp_path / "whole", RUN), folder)
    report = replay.check(load(folder))
    assert report.findings == []
    assert report.summary.endswith(" gradients checked, 0 differ")


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path: Path) -> None:
    lacks = [*PROGRAM, "--data-dir", tmp_path / "nothing"]
    options = ["--model", "mlp", "--clients", 1, "--dataset", "mnist", "--run", "r"]
    code, said = mpirun(2, tmp_path, *options, other=lacks)
    assert code != 0, said
    assert "run_mpi.py: error: MNIST is not in" in said
    assert "Traceback" not in said
