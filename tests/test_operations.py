"""The commands in docs/operations.md: what systemd and Slurm would start, started without them."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfl.auth import main as auth
from tests.support.launch import OFFLINE, TIMEOUT_S, Launcher, finish

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(
    r"^```\n(.*?)^```", (ROOT / "docs/operations.md").read_text(), re.MULTILINE | re.DOTALL
)
SMALL = " --model mlp --batch-size 500"
pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone's root, with a token, in which runs may write."""
    folder = tmp_path / "clone"
    (folder / "shared_files").mkdir(parents=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("run_server.py", "run_client.py"):
        (folder / name).symlink_to(ROOT / name)
    auth(["new-token", str(folder / "token")])
    return folder


def example(start: str, port: int, rounds: int) -> str:
    """Return the example that begins with ``start``, on another port, with a small run."""
    (text,) = [text for text in EXAMPLES if text.startswith(start)]
    changes = {
        "--host 0.0.0.0": f"--host 127.0.0.1 --port {port}",
        ":8765": f":{port}",
        "--rounds 20": f"--rounds {rounds}{SMALL}",
    }
    for old, new in changes.items():
        assert old in text or old == ":8765"
        text = text.replace(old, new)
    return text


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **OFFLINE, **more}


def test_the_unit_starts_a_run_goes_on_with_it_and_leaves_it_when_done(
    clone: Path, launcher: Launcher
) -> None:
    unit = example("[Unit]", launcher.port, rounds=3)
    command = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    left_alone = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)[1].split()
    clients = [launcher.client("--client-id", k, "--token-file", clone / "token") for k in range(3)]
    run = clone / "shared_files/server/first"
    first = subprocess.Popen(command, cwd=clone, env=environment())
    until = time.monotonic() + TIMEOUT_S
    while not (run / "rounds/round_000.csv").exists():
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert subprocess.run(command, cwd=clone, env=environment(), timeout=TIMEOUT_S).returncode == 0
    finish(clients)
    assert "going on with round" in (run / "server_log.txt").read_text()
    again = subprocess.run(command, cwd=clone, env=environment(), timeout=TIMEOUT_S)
    assert str(again.returncode) in left_alone


def test_the_dockerfile_installs_as_the_readme_does_and_leaves_secrets_out() -> None:
    (dockerfile,) = [text for text in EXAMPLES if text.startswith("FROM")]
    (install,) = re.findall(r"^RUN (.*)$", dockerfile, re.MULTILINE)
    assert f"\n{install} && " in (ROOT / "README.md").read_text()
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"token*", "**/*.pem", "**/*.key", "data", "shared_files", ".venv"} <= {*left_out}


def test_the_slurm_script_runs_server_and_clients_and_ends_as_the_server_does(
    clone: Path, launcher: Launcher, tmp_path: Path
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    stubs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": "for k in 1 2 3 4; do echo 127.0.0.1; done",
    }
    for name, body in stubs.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    job = {"SLURM_SUBMIT_DIR": str(clone), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-4]"}
    script = example("#!/bin/bash", launcher.port, rounds=1)
    environ = environment(PATH=path, **job)
    done = subprocess.run(["bash", "-c", script], env=environ, timeout=TIMEOUT_S, cwd=tmp_path)
    assert done.returncode == 0
    assert (clone / "shared_files/server/77/rounds.csv").read_text().count("\n") == 2
    bad = script.replace("--rounds 1", "--rounds 0").replace("for k in 0 1 2", "for k in")
    done = subprocess.run(["bash", "-c", bad], env=environ, timeout=TIMEOUT_S, cwd=tmp_path)
    assert done.returncode == 2
