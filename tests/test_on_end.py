"""``--on-end``: the user's own command after a run, told how it ended and where it lies."""

import signal
from pathlib import Path

import pytest

from sfl.config import RunConfig
from sfl.nodes import ServerNode
from sfl.options import parse_options
from tests.support.launch import Launcher, send_signal, wait_for

TELL = (
    'echo "$SFL_OUTCOME $SFL_RUN_DIR $(tail -n 1 "$SFL_RUN_DIR/server_log.txt")" >> told;'
    ' ls "$SFL_RUN_DIR" | grep ^status.json >> told'  # it is gone by then: nothing
)
FAST = ["--clients", 1, "--model", "mlp", "--batch-size", 500, "--run", "r"]


def test_the_command_is_told_how_a_run_ended(launcher: Launcher, tmp_path: Path) -> None:
    """Interrupted, then done; a command that fails changes nothing, and no folder names one."""
    tell = TELL.replace("told", str(tmp_path / "told"))
    server = launcher.server(*FAST, "--rounds", 1, "--on-end", tell)
    wait_for(server, "listening")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    run = tmp_path / "server/r"
    server = launcher.server(*FAST, "--rounds", 2, "--on-end", f"{tell}; exit 7")
    launcher.client().ended_with(0)
    assert server.ended_with(0) == ""
    assert "--on-end: the command ended with exit code 7; the run itself is done" in server.out
    interrupted, done = (tmp_path / "told").read_text().splitlines()
    assert interrupted.startswith(f"interrupted {run} ")
    assert done.startswith(f"done {run} ")
    assert done.endswith(f"the run lies in {run}")  # the log is whole
    options = ["--resume", str(run), "--rounds", "3"]
    assert parse_options(options, RunConfig, ServerNode, prog="p", about="")[1].on_end == ""
    options = ["--config", str(run / "config.json")]
    assert parse_options(options, RunConfig, ServerNode, prog="p", about="")[1].on_end == ""


@pytest.mark.parametrize("command", ["definitely-not-a-command 2> /dev/null", "kill -9 $$"])
def test_a_run_that_failed_says_so(launcher: Launcher, tmp_path: Path, command: str) -> None:
    """Its own error and exit code stay, and the command's failure is one line."""
    tell = TELL.replace("told", str(tmp_path / "told"))
    (tmp_path / "nowhere").write_text("no folder")
    options = ["--weights", f"dir:{tmp_path / 'nowhere'}", "--on-end", f"{tell}; {command}"]
    server = launcher.server(*FAST, *options)
    assert "nowhere" in server.ended_with(1)
    assert (tmp_path / "told").read_text().startswith(f"failed {tmp_path / 'server/r'} ")
    assert server.out.count("warning: --on-end: the command ended with exit code") == 1
