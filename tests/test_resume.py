"""A run that goes on equals one that was never interrupted, and who may join a run."""

import csv
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from tests.support.launch import Launcher, send_signal, wait_for
from tests.support.made_data import write_own
from tests.support.runs import ALLOW, BN_DROPOUT, go_on
from tests.support.weights import all_weights, assert_equal

OPTIONS = ["--model", BN_DROPOUT, "--cut", 6, "--batch-size", 100]


def uninterrupted(tmp_path: Path, options: Sequence[object]) -> Path:
    (tmp_path / "whole").mkdir()
    whole = Launcher(tmp_path / "whole")
    return whole.run(*OPTIONS, *options, "--rounds", 4, client_options=ALLOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer-state", "keep"],
        ["--scheme", "sflv3", "--optimizer-state", "keep", "--participation", 0.6],
        ["--scheme", "sl", "--optimizer-state", "keep"],
        ["--scheme", "fl", "--aggregation", "fedadam:lr=0.01"],
        ["--scheme", "sync-sgd", "--optimizer-state", "keep", "--participation", 0.6],
        ["--aggregation", "fedyogi:lr=0.01", "--optimizer-state", "keep"],
        ["--scheme", "sflv2", "--lr-schedule", "cosine", "--lr-rounds", 4],
    ],
)
def test_a_finished_run_goes_on_as_if_it_had_not_ended(
    launcher: Launcher, tmp_path: Path, options: list[object]
) -> None:
    launcher.run(*OPTIONS, *options, "--rounds", 2, client_options=ALLOW)
    run = go_on(launcher, "--rounds", 4)
    assert_equal(all_weights(run), all_weights(uninterrupted(tmp_path, options)))
    rows = list(csv.DictReader((run / "rounds.csv").read_text().splitlines()))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    assert [bool(row["test_acc"]) for row in rows] == [False, True, False, True]
    report = replay.check(load(run))
    assert report.findings == []
    server = next(p for p in launcher.programs[4:] if "going on" in p.out)
    assert "going on with round 3/4" in server.out


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_last_round(
    launcher: Launcher, tmp_path: Path
) -> None:
    server = launcher.server("--clients", 3, "--run", "r", *OPTIONS, "--rounds", 500)
    ends = [*ALLOW, "--reconnect-timeout", 0]
    clients = [launcher.client("--client-id", k, *ends) for k in range(3)]
    wait_for(server, "round 2/500")
    send_signal(server, signal.SIGKILL)
    for client in clients:
        client.ended_with(1)
    done = server.out.count("training loss")
    run = go_on(launcher, "--rounds", done + 1)
    (tmp_path / "whole").mkdir()
    whole = Launcher(tmp_path / "whole")
    theirs = whole.run(*OPTIONS, "--rounds", done + 1, client_options=ALLOW)
    assert_equal(all_weights(run), all_weights(theirs))
    assert replay.check(load(run)).findings == []


def test_what_cannot_go_on_says_why(launcher: Launcher, tmp_path: Path) -> None:
    run = launcher.run("--model", "mlp", "--rounds", 1, "--batch-size", 500, clients=1)

    def refused(code: int, *options: object) -> str:
        return launcher.server("--resume", run, *options).ended_with(code)

    assert "has done its 1 round; say with --rounds how many" in refused(2)
    assert "has done its 1 round" in refused(2, "--rounds", 1)
    assert "--lr 0.5: the run has 0.001; of a run that goes on only --rounds" in refused(
        2, "--rounds", 2, "--lr", 0.5
    )
    nothing = launcher.server("--resume", tmp_path / "nothing").ended_with(2)
    assert "cannot read config.json: No such file" in nothing


def test_a_client_that_lost_what_only_it_had_says_so(launcher: Launcher) -> None:
    options = ["--model", "mlp", "--rounds", 2, "--batch-size", 500, "--scheme", "sflv3"]
    run = launcher.run(*options, clients=1)
    shutil.rmtree(launcher.folder / "client/r")
    server, client = launcher.server("--resume", run, "--rounds", 3), launcher.client()
    assert "client_0 lacks what only it has of round 3: start it where" in client.ended_with(1)
    wait_for(server, "client_0 is refused: client_0 lacks what only it has")


def test_clients_with_other_data_cannot_go_on(launcher: Launcher, tmp_path: Path) -> None:
    options = ["--model", "mlp", "--rounds", 1, "--batch-size", 16, "--partition", "own"]
    first, other = (write_own(tmp_path / name, count=n) for name, n in (("a", 60), ("b", 61)))
    run = launcher.run(*options, clients=1, client_options=["--data-dir", first])
    server = launcher.server("--resume", run, "--rounds", 2)
    client = launcher.client("--data-dir", other)
    assert "client_0 has other data than it had in this run" in client.ended_with(1)
    wait_for(server, "client_0 is refused")
    for program in (launcher.client("--data-dir", first), server):
        program.ended_with(0)


OWN = ["--partition", "own", "--model", "mlp", "--batch-size", 16, "--rounds", 2]


def test_more_clients_than_needed_join_before_the_start(launcher: Launcher, tmp_path: Path) -> None:
    """Two are needed, three may come; the third registers while the second still loads."""
    folders = [write_own(tmp_path / f"data_{k}", count=60 + 20 * k) for k in range(3)]
    server = launcher.server("--clients", 2, "--max-clients", 4, "--run", "r", *OWN)
    wait_for(server, "listening")
    slow = launcher.client("--client-id", 3, "--data-dir", launcher.folder / "late")
    assert "no own data" in slow.ended_with(1)
    wait_for(server, "its place is free")
    first = launcher.client("--client-id", 3, "--data-dir", folders[0])
    wait_for(first, "waiting for 1 of 2 clients")
    second = launcher.client("--client-id", 1, "--data-dir", folders[1])
    for program in (server, first, second):
        program.ended_with(0)
    run = launcher.folder / "server/r"
    assert {p.name for p in run.glob("models/client_?_001.pt")} == {
        "client_1_001.pt",
        "client_3_001.pt",
    }
    assert replay.check(load(run)).findings == []
    server = launcher.server("--resume", run, "--rounds", 3)
    clients = [
        launcher.client("--client-id", k, "--data-dir", folders[j]) for k, j in ((3, 0), (1, 1))
    ]
    for program in (server, *clients):
        program.ended_with(0)


def test_clients_beyond_the_most_are_turned_away(launcher: Launcher, tmp_path: Path) -> None:
    folders = [write_own(tmp_path / f"data_{k}", count=60) for k in range(3)]
    options = [*OWN, "--rounds", 500, "--keep-tensors", "none"]
    server = launcher.server("--clients", 2, "--max-clients", 2, "--run", "r", *options)
    clients = [launcher.client("--data-dir", folder) for folder in folders[:2]]
    wait_for(server, "round 1/500")
    third = launcher.client("--data-dir", folders[2])
    assert third.ended_with(1).endswith("the server refused: the run r has its 2 clients")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    for client in clients:
        send_signal(client, signal.SIGINT)
        client.ended_with(3)


SMALL = ["--model", "mlp", "--batch-size", 500]


def test_a_schedule_keeps_its_length_when_a_run_goes_on(launcher: Launcher) -> None:
    """Else the rounds before would be replayed with a learning rate that they never had."""
    run = launcher.run(*SMALL, "--lr-schedule", "cosine", "--rounds", 2, clients=1)
    server, client = launcher.server("--resume", run, "--rounds", 3), launcher.client()
    server.ended_with(0)
    client.ended_with(0)
    assert load(run).run.lr_rounds == 2
    assert replay.check(load(run)).findings == []


def test_a_run_has_one_server_at_a_time(launcher: Launcher) -> None:
    server = launcher.server("--run", "r", *SMALL, "--rounds", 500, "--clients", 1)
    client = launcher.client("--reconnect-timeout", 0)
    wait_for(server, "round 2/500")
    run = launcher.folder / "server/r"
    second = launcher.server("--resume", run, "--rounds", 600, "--port", 0)
    assert "another process is writing" in second.ended_with(1)
    tensors = sum(1 for _ in run.glob("client_files/*/*/*.pt"))
    assert tensors > 0
    send_signal(server, signal.SIGINT)
    assert server.ended_with(3) == "run_server.py: error: interrupted"
    client.ended_with(1)
    assert sum(1 for _ in run.glob("client_files/*/*/*.pt")) >= tensors


def test_only_the_clients_of_a_run_go_on_with_it(launcher: Launcher, tmp_path: Path) -> None:
    folders = {k: write_own(tmp_path / f"data_{k}", count=60 + k) for k in (1, 2, 3)}
    server = launcher.server("--clients", 2, "--max-clients", 4, "--run", "r", *OWN)
    clients = [launcher.client("--client-id", k, "--data-dir", folders[k]) for k in (1, 3)]
    for program in (server, *clients):
        program.ended_with(0)
    server = launcher.server("--resume", launcher.folder / "server/r", "--rounds", 3)
    other = launcher.client("--client-id", 2, "--data-dir", folders[2])
    assert "--client-id 2: this run has the ids 1, 3" in other.ended_with(1)
    first = launcher.client("--client-id", 1, "--data-dir", folders[1])
    wait_for(first, "waiting for 1 of 2 clients: 3")
    last = launcher.client("--data-dir", folders[3])  # the only id that is free
    for program in (server, first, last):
        program.ended_with(0)


def test_a_torn_line_of_a_manifest_is_cut_off(launcher: Launcher) -> None:
    run = launcher.run(*SMALL, "--rounds", 1, clients=1)
    with open(run / "manifest.jsonl", "a") as manifest:
        manifest.write('{"kind": "one_client_mod')
    server, client = launcher.server("--resume", run, "--rounds", 2), launcher.client()
    server.ended_with(0)
    client.ended_with(0)
    assert replay.check(load(run)).findings == []


@pytest.mark.slow
def test_a_recorded_configuration_of_a_run_that_went_on_starts_another(launcher: Launcher) -> None:
    run = launcher.run(*SMALL, "--rounds", 1, clients=1)
    server, client = launcher.server("--resume", run, "--rounds", 2), launcher.client()
    server.ended_with(0)
    client.ended_with(0)
    options = ["--config", run / "config.json", "--run", "fresh", "--seed", 3]
    server = launcher.server(*options, "--port", launcher.port)
    client = launcher.client()
    server.ended_with(0)
    client.ended_with(0)
    assert len(list((launcher.folder / "server/fresh/rounds").iterdir())) == 2


@pytest.mark.slow
def test_a_client_does_not_write_into_another_run_of_that_name(launcher: Launcher) -> None:
    run = launcher.run(*SMALL, "--rounds", 1, clients=1)
    config = launcher.folder / "client/r/client_0/config.json"
    folder = launcher.folder / "client/r"
    (launcher.folder / "elsewhere").mkdir()
    other = Launcher(launcher.folder / "elsewhere")
    theirs = other.run(*SMALL, "--rounds", 1, "--seed", 4, clients=1)
    before = config.read_bytes()
    server = launcher.server("--resume", theirs, "--rounds", 2, "--port", launcher.port)
    client = launcher.client()
    assert "is of another run: --seed 4: the run has 0" in client.ended_with(1)
    wait_for(server, "client_0 is away")
    assert config.read_bytes() == before
    assert folder.is_dir()
    assert run.is_dir()


@pytest.mark.slow
def test_a_run_that_was_killed_in_its_first_round_goes_on(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = ["--model", "mlp", "--batch-size", 100, "--rounds", 1, "--local-epochs", 15]
    server = launcher.server("--clients", 1, "--run", "r", *options)
    client = launcher.client("--reconnect-timeout", 0)
    run = launcher.folder / "server/r"
    while not (run / "client_files/client_0/round_000/labels_0_3.pt").exists():
        server.process.join(0.01)
        assert server.process.is_alive(), server.err
    send_signal(server, signal.SIGKILL)
    client.ended_with(1)
    server, client = launcher.server("--resume", run), launcher.client()
    server.ended_with(0)
    client.ended_with(0)
    (tmp_path / "whole").mkdir()
    theirs = Launcher(tmp_path / "whole").run(*options, clients=1)
    assert_equal(all_weights(run), all_weights(theirs), at_least=6)
    assert replay.check(load(run)).findings == []


@pytest.mark.slow
def test_what_can_change_the_last_bit_is_said_when_a_run_goes_on(launcher: Launcher) -> None:
    run = launcher.run(*SMALL, "--rounds", 1, clients=1)
    server = launcher.server("--resume", run, "--rounds", 2, "--threads", 2)
    client = launcher.client("--threads", 2)
    server.ended_with(0)
    client.ended_with(0)
    assert "warning: threads 2 against 1 of the run so far: the last bit may differ" in server.out
    assert "warning: client_0 comes back with threads 2 against 1 before" in server.out
