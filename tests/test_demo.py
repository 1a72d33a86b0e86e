"""The programs as a user starts them."""

import re
from pathlib import Path

import pytest

from tests.support.programs import run_program


@pytest.mark.slow
def test_the_demo_trains_draws_and_replays(tmp_path: Path) -> None:
    done = run_program("-m", "experiments.demo", "--out", tmp_path)
    accuracy, replayed = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"test accuracy 0\.\d{4}", accuracy)
    assert float(accuracy.split()[-1]) >= 0.90
    table = re.findall(r"^ +(\d+) +\d\.\d{4} ", done.stdout, re.MULTILINE)
    assert table == [str(number) for number in range(1, 11)]  # as in "round 10/10: ..."
    assert replayed == "1020 gradients checked, 0 differ"
    assert done.stderr == ""
    (folder,) = (tmp_path / "server").iterdir()
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/svg+xml') >= 9
    replay = run_program("-m", "experiments.replay", folder)
    assert replay.stdout == "20 models checked, 0 differ\n1020 gradients checked, 0 differ\n"
    damaged = next(folder.glob("client_files/client_1/round_004/grads_*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    replay = run_program("-m", "experiments.replay", folder, code=1)
    assert replay.stdout.startswith(f"{damaged}: is damaged")
    assert replay.stdout.endswith("\n1020 gradients checked, 1 differ\n")


@pytest.mark.slow
def test_a_demo_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_program("-m", "experiments.demo", "--out", tmp_path / "file", code=1)
    assert re.fullmatch(
        r"demo: error: server: run_server.py: error: cannot write .*\n", done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["run_server.py", "run_client.py", "-m experiments.simulate", "-m experiments.replay"],
)
def test_help_and_bad_options(command: str) -> None:
    assert "usage:" in run_program(*command.split(), "--help").stdout
    done = run_program(*command.split(), "--no-such-option", code=2)
    assert done.stderr.count("\n") == 1
    assert "--no-such-option" in done.stderr or "RUN_DIR" in done.stderr


@pytest.mark.slow
def test_a_folder_that_is_no_run_cannot_be_replayed(tmp_path: Path) -> None:
    done = run_program("-m", "experiments.replay", tmp_path, code=1)
    assert done.stderr == (
        f"replay: error: {tmp_path} is no folder of a run: it has no manifest.jsonl\n"
    )


@pytest.mark.slow
def test_the_simulation_is_a_program_too(tmp_path: Path) -> None:
    options = ["--rounds", 1, "--model", "mlp", "--out", tmp_path, "--run", "one"]
    done = run_program("-m", "experiments.simulate", *options)
    assert done.stderr == ""
    assert "round 1/1: training loss" in done.stdout
    assert (tmp_path / "server/one/rounds.csv").exists()
