"""Before the first step: who cannot take part is refused alone, and may come back mended."""

import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.hostile.target import Target
from sfl.archive import run_folder
from sfl.archive.run_folder import FIRST_STEP, SERVER_LOG, EventLog, has_no_steps, make_folder
from sfl.conversation.join import client_join
from sfl.conversation.report import DataReport, data_difference, disagreeing_clients
from sfl.environment import FINGERPRINT
from sfl.errors import SflError
from sfl.runtime.client_places import Place
from sfl.runtime.roster import Roster
from sfl.transport.connection import Connection
from sfl.transport.stream import Stream
from sfl.wire.driver import run_blocking
from sfl.wire.messages import Limits, MessageType
from tests.support.launch import Launcher, Program, send_signal, wait_for
from tests.support.made_data import write_own
from tests.support.runs import FAST, OWN

ONE = ["--rounds", 1, *OWN]


def images(folder: Path, shape: tuple[int, ...] = (28, 28), count: int = 40) -> Path:
    folder.mkdir(parents=True)
    x = np.random.default_rng(1).integers(0, 255, (count, *shape), dtype=np.uint8)
    np.savez(folder / "own.npz", x=x, y=np.arange(count) % 2, classes=np.array(["a", "b"]))
    return folder


def goes_on(launcher: Launcher, server: Program, waiting: Program, *options: object) -> None:
    """See that the run begins, and ends well, once client 1 comes as it should."""
    last = launcher.client("--client-id", 1, *options)
    for program in (server, waiting, last):
        program.ended_with(0)
    assert "Traceback" not in server.out


def wrong_clients(launcher: Launcher) -> dict[str, tuple[list[object], int, str]]:
    """Return what may be wrong with a client: its options, exit code, and what is said of it."""
    folder = launcher.folder
    (folder / "empty").mkdir()
    (folder / "a_file").write_text("")
    return {
        "a wrong --data-dir": (["--data-dir", folder / "nowhere"], 1, "nowhere"),
        "an empty folder": (["--data-dir", folder / "empty"], 1, "empty is empty"),
        "an --out that is a file": (["--out", folder / "a_file"], 1, "cannot write to"),
    }


@pytest.mark.parametrize(
    "what", ["a wrong --data-dir", "an empty folder", "an --out that is a file"]
)
def test_a_client_that_cannot_take_part_ends_alone(launcher: Launcher, what: str) -> None:
    server = launcher.server(*ONE, "--run", "r")
    waiting = launcher.client("--client-id", 0, "--data-dir", images(launcher.folder / "own0"))
    right = ["--data-dir", images(launcher.folder / "own1")]
    wait_for(waiting, "waiting for 1 of 2 clients")
    options, code, why = wrong_clients(launcher)[what]
    assert why in launcher.client("--client-id", 1, *right, *options).ended_with(code)
    wait_for(server, "its place is free")
    assert why in (launcher.folder / "server/r/server_log.txt").read_text()
    goes_on(launcher, server, waiting, *right)


@pytest.mark.slow
def test_a_client_that_does_not_allow_the_model_ends_alone(launcher: Launcher) -> None:
    model = "tests.support.models:bn_dropout"
    server = launcher.server("--clients", 2, "--rounds", 1, "--model", model, "--cut", 4)
    allow = ["--allow-import", model]
    waiting = launcher.client("--client-id", 0, *allow)
    line = launcher.client("--client-id", 1).ended_with(2)
    assert f"give --allow-import {model}" in line
    wait_for(server, f"give --allow-import {model}")
    goes_on(launcher, server, waiting, *allow)


def test_data_that_do_not_go_together_are_said_and_most_decide(launcher: Launcher) -> None:
    """Whoever is outvoted may come back; before all are there it is only a warning."""
    server = launcher.server(*OWN, "--clients", 3, "--rounds", 1)
    folders = [
        write_own(launcher.folder / f"own{k}", classes)
        for k, classes in enumerate((("a", "c"), ("a", "b"), ("a", "b")))
    ]
    odd = launcher.client("--client-id", 0, "--data-dir", folders[0])
    wait_for(server, "client_0 is ready")
    first = launcher.client("--client-id", 1, "--data-dir", folders[1])
    why = "classes differ: client_0 has 2 (a, c), client_1 2 (a, b)"
    wait_for(server, f"warning: {why}")
    second = launcher.client("--client-id", 2, "--data-dir", folders[2])
    assert "classes differ: client_1 has 2 (a, b), client_0 2 (a, c)" in odd.ended_with(1)
    wait_for(server, "client_0 is refused: classes differ")
    mended = launcher.client("--client-id", 0, "--data-dir", folders[1])
    for program in (server, first, second, mended):
        program.ended_with(0)


def report(*classes: str, shape: tuple[int, ...] = (1, 28, 28)) -> DataReport:
    return DataReport({"train": 1, "validation": 0, "test": 0}, classes, shape, "0" * 64)


def test_the_largest_group_stays_and_of_equal_ones_that_of_the_lowest_id() -> None:
    ab, ac, small = report("a", "b"), report("a", "c"), report("a", "b", shape=(1, 8, 8))
    assert disagreeing_clients({0: ab, 1: ab}) == {}
    assert disagreeing_clients({0: ac, 1: ab, 2: ab}).keys() == {0}
    assert disagreeing_clients({3: ab, 1: ac}).keys() == {3}
    assert disagreeing_clients({0: small, 1: ab, 2: ac, 3: ac}).keys() == {0, 1}
    assert "shape [1, 8, 8], client_1 [1, 28, 28]" in data_difference(1, 0, {0: small, 1: ab})


def test_corrected_data_replace_those_of_before_the_start(launcher: Launcher) -> None:
    wrong, right = images(launcher.folder / "wrong", count=10), images(launcher.folder / "right")
    server = launcher.server(*ONE)
    first = launcher.client("--client-id", 1, "--data-dir", wrong)
    wait_for(server, "client_1 is ready: 8 train")
    send_signal(first, signal.SIGTERM)
    first.ended_with(3)
    waiting = launcher.client("--client-id", 0, "--data-dir", images(launcher.folder / "own0"))
    wait_for(waiting, "waiting for 1 of 2")
    goes_on(launcher, server, waiting, "--data-dir", right)
    assert "client_1 is ready: 32 train" in server.out


def test_a_client_of_one_sample_is_said_where_the_model_needs_more(launcher: Launcher) -> None:
    model = ["--model", "tests.support.models:refusing_large", "--cut", 2]
    server = launcher.server(*ONE, *model)
    allow = ["--allow-import", model[1]]
    own = images(launcher.folder / "own0")
    waiting = launcher.client("--client-id", 0, "--data-dir", own, *allow)
    wait_for(waiting, "waiting for 1 of 2")
    one = images(launcher.folder / "one", count=1)
    line = launcher.client("--client-id", 1, "--data-dir", one, *allow).ended_with(1)
    assert "block 3 (BatchNorm1d)" in line
    assert "it has one training sample, and the model needs more" in line
    goes_on(launcher, server, waiting, "--data-dir", own, *allow)


# Folders


@pytest.mark.slow
def test_a_folder_in_which_no_step_was_taken_is_taken_over(launcher: Launcher) -> None:
    """The same command works again, on the server and on a client that had come."""
    command = ["--run", "r", "--clients", 2, "--rounds", 1, *FAST]
    server = launcher.server(*command)
    client = launcher.client("--client-id", 0)
    wait_for(client, "waiting for 1 of 2")
    assert "another --run" in launcher.server(*command, "--port", 0).ended_with(2)  # it is held
    send_signal(server, signal.SIGKILL)
    server.process.join()
    server = launcher.server(*command)
    wait_for(server, f"{launcher.folder / 'server/r'} is taken over: no step was taken in it")
    other = launcher.client("--client-id", 1)
    for program in (server, client, other):
        program.ended_with(0)
    assert "exists" in launcher.server(*command).ended_with(2)
    log = (launcher.folder / "server/r/server_log.txt").read_text()
    assert log.count("listening on") == 2


def test_a_folder_in_which_another_program_has_just_taken_a_step_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended between our look into its log and our lock of it."""
    log = tmp_path / SERVER_LOG
    log.write_text("the run waits for its clients\n")
    (tmp_path / "models").mkdir()
    opened = run_folder.EventLog

    def opened_a_little_later(path: Path) -> EventLog:
        log.write_text(f"{FIRST_STEP}\n")
        return opened(path)

    monkeypatch.setattr(run_folder, "EventLog", opened_a_little_later)
    assert not make_folder(tmp_path, SERVER_LOG)
    assert (tmp_path / "models").is_dir()


@pytest.mark.slow
def test_weights_of_a_finished_run_are_not_taken_over(launcher: Launcher) -> None:
    """Another --out, the same name in the same place, and a start that failed."""
    place = launcher.folder / "shared"
    weights = ["--weights", f"dir:{place}", "--run", "r", "--clients", 1, "--rounds", 1, *FAST]
    server = launcher.server(*weights)
    client = launcher.client("--allow-weights", f"dir:{place}")
    for program in (server, client):
        program.ended_with(0)
    kept = sorted(place.rglob("*.pt"))
    elsewhere = ["--out", launcher.folder / "elsewhere"]
    server = launcher.server(*weights, *elsewhere)
    wait_for(server, "listening")
    send_signal(server, signal.SIGKILL)
    server.process.join()
    assert "has rounds of a run r" in launcher.server(*weights, *elsewhere).ended_with(2)
    assert sorted(place.rglob("*.pt")) == kept


def test_what_lies_in_a_folder_tells_whether_a_step_was_taken(
    launcher: Launcher, tmp_path: Path
) -> None:
    folder = launcher.run("--rounds", 1, *FAST, clients=1)
    assert not has_no_steps(folder)
    assert not has_no_steps(folder.parents[1] / "client/r/client_0")
    for left in (
        "models/client_model_000.pt", "rounds/round_000.csv", "checkpoints/round_001.json",
        "client_files/client_0/round_000/labels_0_0.pt", "predictions/client_0_000.pt", "mine.txt",
    ):  # fmt: skip
        alone = tmp_path / "alone"
        (alone / left).parent.mkdir(parents=True)
        (alone / left).touch()
        assert not has_no_steps(alone)
        shutil.rmtree(alone)
    fresh = tmp_path / "fresh"
    for half in ("config.json.tmp", "models/server_model_init.pt.tmp"):  # killed while it wrote
        (fresh / half).parent.mkdir(parents=True)
        (fresh / half).touch()
        assert has_no_steps(fresh)
        shutil.rmtree(fresh)
    fresh.mkdir()
    (fresh / "models").symlink_to(folder / "models")
    assert not has_no_steps(fresh)


# Whoever means harm


def joined(stream: Stream) -> Connection:
    """Register as client 1."""
    link = Connection(stream, timeout_s=15, limits=Limits())
    link.peer_name, link.on_notice = "server", lambda line: None
    fingerprint = dict.fromkeys(FINGERPRINT, "x")
    run_blocking(client_join(link, 1, fingerprint, instance="1" * 32, heartbeat_s=10.0))
    return link


def reports(**changed: object) -> Callable[[Connection], None]:
    fields = {
        "num_samples": {"train": 8, "validation": 0, "test": 0}, "classes": ["a", "b"],
        "input_shape": [1, 28, 28], "digest": "0" * 64, "class_counts": [], "rounds": [],
        "tells_classes": True,
    }  # fmt: skip

    def harm(link: Connection) -> None:
        content = fields | changed
        link.send_message_as_json(MessageType.REQUEST_TO_START, content=content)

    return harm


def says(kind: MessageType) -> Callable[[Connection], None]:
    return lambda link: link.send_message_as_json(kind, content="of bad will")


def garbage(link: Connection) -> None:
    link._stream.send([memoryview(b"SFL\n" + bytes(100))])


HARM = {
    "10^18 samples": reports(num_samples={"train": 10**18, "validation": 0, "test": 0}),
    "no samples": reports(num_samples={"train": 0, "validation": 0, "test": 0}),
    "another shape": reports(input_shape=[3, 8, 8]),
    "other classes": reports(classes=["a", "c"]),
    "a class too many": reports(classes=["a"] * 2000),
    "classes that are no text": reports(classes=[1, 2]),
    "no digest": reports(digest="x"),
    "rounds that are none": reports(rounds=[-1]),
    "garbage": garbage,
    "ABORT": says(MessageType.ABORT),
    "FAILED": says(MessageType.FAILED),
    "INVALID_MESSAGE": says(MessageType.INVALID_MESSAGE),
    "a message out of turn": says(MessageType.TRAINING_DONE),
}


def test_nobody_else_is_disturbed_by_what_a_client_says_before_the_start(
    launcher: Launcher,
) -> None:
    server = launcher.server(*ONE, "--run", "r")
    own = images(launcher.folder / "own")
    waiting = launcher.client("--client-id", 0, "--data-dir", own)
    wait_for(waiting, "waiting for 1 of 2 clients")
    for count, (name, harm) in enumerate(HARM.items(), 1):
        with Target("127.0.0.1", launcher.port).reach() as stream:
            link = joined(stream)
            harm(link)
            with contextlib.suppress(SflError):
                while True:
                    link._next()
        while server.out.count("its place is free") < count:
            assert server.process.is_alive(), f"{name}: {server.err}"
            server.process.join(0.02)
    goes_on(launcher, server, waiting, "--data-dir", own)


@pytest.mark.slow
def test_a_server_whose_clients_are_all_refused_says_so_again_and_again(launcher: Launcher) -> None:
    """On its console and in its log, every 30 seconds."""
    model = "tests.support.models:bn_dropout"
    server = launcher.server("--clients", 2, "--model", model, "--cut", 6)
    for k in range(2):
        assert f"give --allow-import {model}" in launcher.client("--client-id", k).ended_with(2)
    line = "waiting for 2 of 2 clients: 0, 1; not there any more: client_0 (client_0 stopped: "
    wait_for(server, line)
    assert line in next(launcher.folder.glob("server/*/server_log.txt")).read_text()
    assert f"--allow-import {model}" in server.out.splitlines()[-1]


def test_few_of_those_who_have_left_before_the_start_are_named() -> None:
    places = {k: Place(why=f"why {k}") for k in range(5)}
    waiting = "waiting for 6 of 6 clients: 0, 1, 2, 3, 4, 5"
    roster = Roster("r", frozenset(range(6)), 6)
    assert roster.missing_message == waiting
    roster.places = {3: places[3]}
    assert roster.missing_message == f"{waiting}; not there any more: client_3 (why 3)"
    roster.places = places
    left = ", ".join(f"client_{k} (why {k})" for k in range(3))
    assert roster.missing_message == f"{waiting}; not there any more: {left}, ..."


def test_who_loads_data_is_there() -> None:
    """Also one that has come back to a run."""
    roster = Roster("r", frozenset(range(12)), 12)
    assert roster.there_message == "nobody is there"
    link: Any = object()
    roster.places = {k: Place(link=link, ready=k == 2) for k in (0, 1, 2)}
    assert roster.there_message == "there: client_2; loading: client_0, client_1"
    roster.places = {k: Place(link=link) for k in range(12)}
    assert roster.there_message == "12 clients loading"
