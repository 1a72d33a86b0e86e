"""``run_client.py --check``: what is well and what is not, in a line each, and nobody notices."""

from pathlib import Path

import pytest

from experiments.support.same_run import compare
from sfl.auth import main as auth_main
from sfl.config import RunConfig
from sfl.nodes import NodeConfig
from sfl.runtime.client_check import NOT_CHECKED, NOT_OK, OK
from sfl.runtime.simulation import simulate
from sfl.wire.messages import MessageType
from tests.support.certificates import Certificates
from tests.support.launch import Launcher, Program, wait_for
from tests.support.models import VARIANT
from tests.support.proxy import UP, Proxy
from tests.support.runs import FAST, LONG


def lines(program: Program, code: int) -> dict[str, str]:
    """Return what a check said, by what it is about, once it has ended with a code."""
    assert program.wait() == code, program.out + program.err
    assert program.err == ""
    said = {}
    for line in program.out.splitlines():
        state, _, rest = line.partition(":")
        if state in (OK, NOT_OK, NOT_CHECKED):
            what, _, text = rest.partition(":")
            said[what.strip()] = f"{state}:{text}"
    return said


def written(folder: Path) -> list[Path]:
    return list(folder.glob("client/**/*"))


def test_all_is_well_before_a_run_and_the_run_does_not_notice(
    launcher: Launcher, tmp_path: Path
) -> None:
    run = {"model": "mlp", "batch_size": 200, "rounds": 1, "clients": 2, "run": "r"}
    server = launcher.server(*FAST, "--rounds", 1, "--clients", 2, "--run", "r")
    wait_for(server, "listening")
    for options in (["--client-id", 1], []):
        said = lines(launcher.client("--check", "--connect-timeout", 0.2, *options), 0)
        assert list(said) == ["device", "address", "token", "run", "data", "model", "disk"]
        assert all(text.startswith("ok:") for text in said.values())
        assert said["token"] == "ok: the server asks for none"
    assert "2000 train" not in said["data"]
    assert said["data"].endswith("samples of mnist-5k for client_0")
    assert "mlp cut at 3, vanilla; the server takes it" in said["model"]
    assert written(launcher.folder) == []
    assert "registered" not in server.out
    first = launcher.client("--client-id", 0)
    wait_for(server, "client_0 is ready")
    said = lines(launcher.client("--check", "--client-id", 0, "--out", tmp_path / "other"), 0)
    assert said["place"] == "not checked: client_0 is connected, at the moment"
    said = lines(launcher.client("--check", "--client-ids", "0-1", "--device", "cpu,cpu"), 0)
    assert said["device"] == "ok: cpu, cpu"
    for program in (server, first, launcher.client("--client-id", 1)):
        program.ended_with(0)
    whole = simulate(RunConfig(**run), NodeConfig(out=str(tmp_path / "whole")))
    assert compare(whole, launcher.folder / "server/r").lines == []


def test_a_run_that_is_on_does_not_notice(launcher: Launcher) -> None:
    server = launcher.server(*LONG, "--clients", 1)
    client = launcher.client("--client-id", 0)
    wait_for(server, "round 2/1000")
    assert lines(launcher.client("--check", "--client-id", 0), 0)["place"].startswith("not checked")
    done = server.out.count("training loss")
    wait_for(server, f"round {done + 2}/1000")
    assert "is away" not in server.out
    assert client.process.is_alive()


def test_nobody_is_there(launcher: Launcher) -> None:
    said = lines(launcher.client("--check", "--connect-timeout", 0.2), 1)
    assert said["address"].startswith("NOT OK: no server at")
    assert said["data"] == "not checked: which run it is, only the server says"
    assert said["disk"].startswith("ok:")


@pytest.mark.parametrize(
    "options", [["--server", "nowhere", "--connect-timeout", 1], ["--client-id", -1]]
)
def test_bad_options_are_bad_options_or_not_well(launcher: Launcher, options: list[object]) -> None:
    program = launcher.client("--check", *options)
    assert program.wait() in (1, 2)
    assert "Traceback" not in program.out + program.err


def test_the_token(launcher: Launcher, tmp_path: Path) -> None:
    ca = Certificates(tmp_path)
    for name in ("token", "other"):
        auth_main(["new-token", str(tmp_path / name)])
    server = launcher.server(
        *FAST, "--clients", 1, "--token-file", tmp_path / "token", *ca.issue("server")
    )
    wait_for(server, "listening")
    check = ["--check", "--tls-ca", ca.trust]
    said = lines(launcher.client(*check, "--token-file", tmp_path / "token"), 0)
    assert said["token"] == "ok: the server has the same"
    assert said["address"].endswith("answers, under TLS")
    said = lines(launcher.client(*check, "--token-file", tmp_path / "other"), 1)
    assert said["token"].startswith("NOT OK: the server does not have the token")
    assert said["address"].startswith("ok:")
    said = lines(launcher.client(*check), 1)
    assert said["token"].startswith("NOT OK: the server refused: this server asks for a token")
    said = lines(launcher.client(*check, "--token-file", tmp_path / "nothing"), 1)
    assert "No such file" in said["token"]
    said = lines(launcher.client("--check"), 1)
    assert any("give --tls-ca" in text for text in said.values())


def test_the_place_the_data_and_the_disk(launcher: Launcher, tmp_path: Path) -> None:
    server = launcher.server(*FAST, "--clients", 1, "--dataset", "mnist", "--run", "r")
    wait_for(server, "listening")
    assert "has the ids 0 to 0" in lines(launcher.client("--check", "--client-id", 3), 1)["run"]
    (tmp_path / "file").write_text("")
    said = lines(launcher.client("--check", "--data-dir", tmp_path, "--out", tmp_path / "file"), 1)
    assert said["data"].startswith("NOT OK: MNIST is not in")
    assert said["model"] == "not checked: it is built for the data"
    assert said["disk"].startswith("NOT OK: ")
    wait_for(server, "turned away 127.0.0.1")
    assert server.process.is_alive()


def test_other_code_and_a_model_that_is_not_allowed(launcher: Launcher) -> None:
    model = "tests.support.models:of_this_machine"
    allow = ["--allow-import", model]
    server = launcher.server("--model", model, "--cut", 3, "--clients", 1, *FAST[2:], "--rounds", 1)
    wait_for(server, "listening")
    said = lines(launcher.client("--check", *allow, env={VARIANT: "class"}), 1)
    assert "the server would refuse: client_0 builds another model" in said["model"]
    assert "block 'act' differs" in said["model"]
    said = lines(launcher.client("--check"), 1)
    assert "--allow-import" in said["model"]
    lines(launcher.client("--check", *allow), 0)
    for program in (launcher.client(*allow), server):
        program.ended_with(0)


def test_a_client_that_keeps_its_labels_refuses_a_run_that_shares_them(launcher: Launcher) -> None:
    """It has told nothing but its id and what it computes with."""
    server = launcher.server(*FAST, "--rounds", 1, "--clients", 1)
    wait_for(server, "listening")
    proxy = Proxy(launcher.port)
    keeps = ["--keep-labels", "--server", f"127.0.0.1:{proxy.port}"]
    why = "--keep-labels: the server runs --topology vanilla with --cut 3"
    assert why in lines(launcher.client("--check", *keeps), 1)["model"]
    assert why in launcher.client(*keeps).ended_with(2)
    wait_for(server, why)
    proxy.close()
    told = {m.type for c in proxy.connections for way, m in c.messages if way == UP}
    assert told - {MessageType.HEARTBEAT} == {
        MessageType.CHECK, MessageType.UNREGISTER, MessageType.REGISTER, MessageType.ABORT
    }  # fmt: skip
    assert written(launcher.folder) == []
    for program in (launcher.client(), server):
        program.ended_with(0)


def test_the_store_of_weights(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    place = f"dir:{tmp_path / 'place'}"
    server = launcher.server(*FAST, "--clients", 1, "--weights", place)
    wait_for(server, "listening")
    assert "which this client does not allow" in lines(launcher.client("--check"), 1)["weights"]
    said = lines(launcher.client("--check", "--allow-weights", place), 0)
    assert said["weights"].endswith("can be used")
