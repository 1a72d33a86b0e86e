"""Every transport keeps the same contract, clause by clause."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.bench.peers.mpi import launcher
from sfl.nodes import ClientNode, ServerNode
from tests.support.certificates import Certificates
from tests.support.contract import CLAUSES, TIMEOUT_S, call_over, serve_over
from tests.support.launch import free_port, options_of
from tests.support.runs import ALLOW, RUN
from tests.support.simulations import reference
from tests.support.weights import assert_same

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "ws", "wss"])
def test_the_contract_holds_over_sockets(transport: str, tmp_path: Path) -> None:
    ours, theirs = {}, {}
    if transport == "wss":
        authority = Certificates(tmp_path)
        _, cert, _, key = authority.issue("server")
        ours = {"tls_cert": str(cert), "tls_key": str(key)}
        theirs = {"tls_ca": str(authority.trust)}
    failures: list[BaseException] = []
    listening = threading.Event()
    address = ""

    def started(where: str) -> None:
        nonlocal address
        address = where
        listening.set()

    def serve() -> None:
        node = ServerNode(port=0, transport=transport[:2] if transport != "tcp" else "tcp", **ours)
        try:
            serve_over(node, started)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    assert listening.wait(30), failures
    scheme = "" if transport == "tcp" else f"{transport}://"
    call_over(ClientNode(server=f"{scheme}{address}", peer_timeout=TIMEOUT_S, **theirs))
    thread.join()
    assert failures == []


def ended_well(done: subprocess.Popen[str]) -> None:
    out, _ = done.communicate(timeout=180)
    assert done.returncode == 0, out
    assert f"{len(CLAUSES)} clauses hold" in out


def start(*command: str) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


@pytest.mark.slow
def test_the_contract_holds_over_mpi() -> None:
    pytest.importorskip("mpi4py")
    module = (sys.executable, "-m", "mpi4py", "-m", "tests.support.contract", "mpi")
    ended_well(start(*launcher(2), *module))


@pytest.mark.slow
def test_a_run_over_rpc_gives_the_same_weights(tmp_path: Path) -> None:
    port, out = free_port(), ("--out", str(tmp_path))
    words = [str(w) for w in (*options_of(RUN), *ALLOW, *out, "--port", port)]
    server = start(sys.executable, "run_server.py", "--transport", "rpc", *words)
    run_client = (sys.executable, "run_client.py", *out, *map(str, ALLOW), "--server")
    clients = [
        start(*run_client, f"rpc://127.0.0.1:{port}/{k + 1}/4", "--client-id", str(k))
        for k in range(3)
    ]
    for program in (server, *clients):
        said, _ = program.communicate(timeout=180)
        assert program.returncode == 0, said
    assert_same(reference(tmp_path / "whole", RUN), tmp_path / "server/r")


@pytest.mark.slow
def test_the_contract_holds_over_rpc() -> None:
    address = f"127.0.0.1:{free_port()}"
    module = (sys.executable, "-m", "tests.support.contract", "rpc")
    sides = [start(*module, side, address) for side in ("server", "client")]
    for side in sides:
        ended_well(side)
