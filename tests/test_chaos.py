"""A short run of ``experiments.chaos``, and that what it compares would be found."""

import re
import shutil
from pathlib import Path

import pytest

from experiments.support.same_run import compare
from tests.support.programs import run_program
from tests.support.runs import RUN
from tests.support.simulations import reference

TASKS = ["--topology", "multi-task", "--tasks", "digit,parity", "--delay-ms", 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "trouble"),
    [
        ("sflv2", ["--kills", 3, "--stops", 1, "--cut", "3,9"]),
        (
            "sflv3",
            [*TASKS, "--optimizer-state", "keep", "--kills", 2, "--cuts", 4, "--flips", 4],
        ),
    ],
)
def test_chaos_leaves_no_trace(tmp_path: Path, scheme: str, trouble: list[object]) -> None:
    options = ["--scheme", scheme, "--seed", 4, "--rounds", 5, "--batch-size", 50]
    done = run_program("-m", "experiments.chaos", *options, *trouble, "--out", tmp_path)
    kills = trouble[trouble.index("--kills") + 1]
    assert done.stdout.splitlines()[-1] == f"{kills} kills survived, 0 tensors differ"
    assert len(re.findall(r"s  SIGKILL  (?:server|task:parity|client_\d)", done.stdout)) == kills


@pytest.mark.slow
def test_what_differs_between_runs_is_found(tmp_path: Path) -> None:
    run = RUN | {"rounds": 2, "clients": 2, "topology": "multi-task", "tasks": "digit,parity"}
    whole = reference(tmp_path / "a", run)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = tmp_path / "b/server/r"
    assert compare(whole, other).lines == []
    assert compare(whole, other).tensors > 100
    model, grads = "models/server_model_001.pt", "client_files/client_1/round_001/grads_1_2.pt"
    further = tmp_path / "b/task_parity/r"
    for path in (other / model, other / grads, further / model, further / grads):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"x")
        found = compare(whole, other)
        assert found.count >= 1
        assert any(path.name in line for line in found.lines), found.lines
        path.write_bytes(data)
    for figures in (other / "rounds/round_001.csv", further / "rounds/round_001.csv"):
        text = figures.read_text()
        figures.write_text(text.replace("val_acc,0", "val_acc,1"))
        assert compare(whole, other).count >= 1
        figures.write_text(text)
    shutil.rmtree(other / "client_files/client_0/round_000")
    assert compare(whole, other).count >= 1
