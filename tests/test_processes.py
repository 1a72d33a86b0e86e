"""A server and clients as processes of their own, started from a Python session."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sfl
from sfl.errors import ConfigError, RunError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def test_a_run_over_sockets_is_the_simulated_one(tmp_path: Path) -> None:
    config = sfl.RunConfig(model="mlp", clients=2, rounds=2, batch_size=64, run="r")
    with (
        sfl.serve(config, port=0, out=str(tmp_path / "sockets")) as server,
        sfl.join(server.address(120), client_ids="0-1", out=str(tmp_path / "sockets")) as client,
    ):
        assert server.is_running
        run = server.run(timeout=120)
        client.wait(timeout=60)
    assert "the run is over" in client.output
    assert repr(server).endswith("ended with 0>")
    reference = sfl.simulate(config, out=str(tmp_path / "simulated")).model().state_dict()
    found = run.model().state_dict()
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name]) for name in found)


def test_nothing_waits_longer_than_it_is_told(tmp_path: Path) -> None:
    server = sfl.serve(sfl.RunConfig(model="mlp", run="r"), port=0, out=str(tmp_path))
    address = server.address(timeout=120)
    group = os.getpgid(server._process.pid)  # that an interrupt goes to
    assert group != os.getpgid(0)
    with pytest.raises(RunError, match=r"the server is still running after 0.1 s"):
        server.wait(timeout=0.1)
    with pytest.raises(ConfigError, match="did you mean"):
        sfl.join(address, client_idd=3)
    with pytest.raises(RunError, match=r"the client of .* exit code 1: .*client"):
        sfl.join(address, client_id=7, out=str(tmp_path)).wait(timeout=60)
    server.stop()
    assert not server.is_running
    with pytest.raises(RunError, match=r"exit code 3: run_server.py: error: interrupted"):
        server.run(timeout=1)
    refused = sfl.serve(sfl.RunConfig(scheme="sflv9"), port=0, out=str(tmp_path))
    with pytest.raises(RunError, match=r"has not said where it listens: .*sflv9"):
        refused.address(timeout=120)


def test_a_session_that_ends_leaves_no_process(tmp_path: Path) -> None:
    code = f"""
        import sfl
        server = sfl.serve(sfl.RunConfig(model="mlp"), port=0, out={str(tmp_path)!r})
        server.address(timeout=120)
        print(server._process.pid)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
