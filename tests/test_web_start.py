"""The site for browsers as a command: what it serves, which options fit, how it ends."""

import json
import os
import signal
import socket
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("websockets")
pytest.importorskip("onnxruntime")
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import sfl
from experiments.web import question
from experiments.web.__main__ import main
from experiments.web.model_files import ModelFiles
from experiments.web.serving import chosen_files, told
from sfl.errors import ConfigError, RunError
from sfl.nodes import ServerNode
from tests.support.handshakes import TOKEN, token_file
from tests.support.launch import Launcher, finish, send_signal, wait_for
from tests.support.served_site import serving, silent
from tests.support.simulations import simulated

pytestmark = pytest.mark.slow  # each starts a server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sfl.Run:
    return sfl.open_run(simulated(tmp_path_factory.mktemp("run"), model="mlp", rounds=1))


def test_a_server_that_trains_is_joined_with_the_token_of_the_site(
    run: sfl.Run, tmp_path: Path
) -> None:
    """The client here has neither token nor certificate authority, as a page has none."""
    secret = token_file(tmp_path, f"0 {TOKEN}")
    trainer = Launcher(tmp_path / "trainer", transport="wss")
    trainer.folder.mkdir()
    options = ["--clients", 1, "--rounds", 1, "--model", "mlp", "--batch-size", 200, "--run", "t"]
    server = trainer.server("--token-file", secret, *options)
    try:
        wait_for(server, "listening on")
        trains = ["--train", f"127.0.0.1:{trainer.port}", "--token-file", secret]
        trains += ["--tls-ca", trainer._certificates.trust]
        with serving(tmp_path, run, *trains) as site:
            assert json.loads(site.ask("/model.json").content)["train"] is True
            assert "HTTP/1.1 400" in site.answers(site.request("/train?client=x"))
            with (
                connect(f"ws://127.0.0.1:{site.port}/train?client=1") as socket,
                pytest.raises(ConnectionClosed, match=r"1008.*no token for"),
            ):
                socket.recv(timeout=20)
            at = ["--server", f"ws://127.0.0.1:{site.port}/train?client=0", "--client-id", 0]
            finish([site.launcher.client(*at), server])
            with (
                connect(f"ws://127.0.0.1:{site.port}/train?client=0") as socket,
                pytest.raises(ConnectionClosed, match=r"1013 .*behind this site is not there"),
            ):
                socket.recv(timeout=20)
            wait_for(site.program, "/train: the server behind this site is not there")
            assert "an unknown address" not in site.program.out
    finally:
        trainer.end()


def test_a_silent_server_that_trains_holds_up_no_page_and_no_end(
    run: sfl.Run, tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent_server,
        serving(tmp_path, run, "--train", f"127.0.0.1:{silent_server.getsockname()[1]}") as site,
        ThreadPoolExecutor(8) as pool,
    ):
        assert site.ask("/model.json").status == 200  # the first one takes a while
        began = time.monotonic()
        asking = [pool.submit(site.ask, "/training.json") for _ in range(6)]
        time.sleep(0.3)  # until they are being answered
        assert [site.ask(path).status for path in ("/", "/model.json")] == [200, 200]
        assert not any(asked.done() for asked in asking)
        for asked in asking:
            assert b"does not answer: is it a server that trains?" in asked.result().content
        assert time.monotonic() - began < 2 * question.WAIT_S  # all share one question
        with connect(f"ws://127.0.0.1:{site.port}/predict") as predicting:
            idle = silent(site, 3, b"GET /")
            send_signal(site.program, signal.SIGTERM)
            began = time.monotonic()
            with pytest.raises(ConnectionClosed, match=r"1001 .*the site is ending"):
                predicting.recv(timeout=20)
        assert site.program.ended_with(3) == "web: error: interrupted"
        assert time.monotonic() - began < 3 * question.SILENT_S
        for sock in idle:
            sock.close()


def test_a_port_in_use_is_said(run: sfl.Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        program = Launcher(tmp_path, port=taken.getsockname()[1]).web(run.path)
        assert "another --port or --host may be free" in program.ended_with(1)
        assert program.out == ""  # it is the first that is tried


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--host", "0.0.0.0"], "give --tls-cert and --tls-key, or --insecure"),
        (["--port", "70000"], "port .*must be in"),
        (["--token-file", "x"], "--token-file: is for the server of --train"),
        (["--train", "rpc://127.0.0.1:1/1/2"], "give HOST:PORT of a server over tcp or ws"),
        (["--train", "wss://127.0.0.1:1"], "give --tls-ca"),
        (["--client", "7"], "--client 7: the run has 3 clients"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key: give both"),
        (["--seed", "1"], "--seed is an option of"),
        (["--name", "a b"], "no host's name"),
    ],
)
def test_what_does_not_fit_is_refused(run: sfl.Run, options: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        main([str(run.path), *options, "--port", "0"] if "--port" not in options else options)


def test_which_runs_have_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"there is no finished run in .*experiments.demo"):
        main(["--out", str(tmp_path)])
    for options, why in (
        ({"scheme": "fl"}, "no server holds a part of the model"),
        ({"scheme": "sflv3"}, "each client keeps .* --client"),
        (
            {"topology": "vertical", "partition": "vertical", "model": "mlp"},
            "a part of each sample",
        ),
    ):
        simulated(tmp_path, run="x".join(options.values()), rounds=1, **{"model": "mlp"} | options)
        with pytest.raises((ConfigError, RunError), match=why):
            main(["--out", str(tmp_path)])  # the newest
    usable = simulated(tmp_path, run="usable", rounds=1, model="mlp")
    os.utime(usable / "rounds.csv", (0, 0))
    options = Namespace(run="", client=None, share_samples=False)
    assert chosen_files(options, ServerNode(out=str(tmp_path))).run.path == usable
    assert "newer, but not for a page: fl: " in capsys.readouterr().out


def test_samples_are_shown_to_this_machine_alone(run: sfl.Run) -> None:
    def served(host: str, **options: bool) -> tuple[ModelFiles, str]:
        given = {"share_samples": False, "no_decoder": True} | options
        typed = Namespace(run=str(run.path), client=None, names=[], **given)
        node = ServerNode(host=host, insecure=True)
        files = chosen_files(typed, node)
        return files, "\n".join(told(node, typed, 80, files))

    files, said = served("127.0.0.1")
    assert len(files.test_set) == 1000
    assert "samples" not in said
    files, said = served("0.0.0.0")
    with pytest.raises(ConfigError, match="stay on the site's machine: see --share-samples"):
        files.sample({"index": "0"})
    assert json.loads(files.about(dict).body)["num_samples"] == 0
    assert "samples" not in said
    files, said = served("0.0.0.0", share_samples=True, no_decoder=False)
    assert files.sample({"index": "0"}).body
    assert "--share-samples: they have the test samples of the run's data set, too" in said
    assert "a decoder that was trained on test samples" in said


def test_a_u_shaped_run_has_two_segments_in_the_page(tmp_path: Path) -> None:
    run = sfl.open_run(simulated(tmp_path, model="lenet5", rounds=1, cut="3,9", clients=1))
    files = ModelFiles(run, ServerNode())
    about = json.loads(files.about(dict).body)
    assert [(s["name"], s["file"]) for s in about["segments"]] == [
        ("front", "model/front.onnx"), ("back", ""), ("client_head", "model/client_head.onnx"),
    ]  # fmt: skip
    assert [(f["link"], f["sent"]) for f in about["features"]] == [(0, True), (1, False)]
    assert {"/model/client_head.onnx", "/model/whole.onnx"} < files.routes().keys()
