"""What goes wrong in real processes: one clear line, the right exit code, a clean end for all."""

import contextlib
import signal
import socket
import threading
from pathlib import Path

import pytest

from sfl.files.checksum import crc32
from sfl.wire.framing import pack_head
from tests.support.launch import Launcher, send_signal, wait_for
from tests.support.made_data import write_own
from tests.support.runs import FAST, LONG, OWN, start_long_run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_server_says_how_to_go_on_and_ends_clients_that_do_not_wait(
    launcher: Launcher, number: int
) -> None:
    server, clients = start_long_run(launcher, 2, "--reconnect-timeout", 0)
    send_signal(server, number)
    assert server.ended_with(3) == "run_server.py: error: interrupted"
    for client in clients:
        line = "run_client.py: error: the server stopped: it was interrupted"
        assert client.ended_with(1) == line
    log = next(launcher.folder.glob("server/*/server_log.txt"))
    failed, hint = log.read_text().splitlines()[-2:]
    assert failed.endswith("the run failed: it was interrupted")
    assert hint.endswith(f"go on with: run_server.py --resume {log.parent}")
    assert server.out.splitlines()[-1] == f"go on with: run_server.py --resume {log.parent}"


def test_a_second_interrupt_ends_at_once(launcher: Launcher) -> None:
    """The first one waits for a peer that takes nothing, to tell it why."""
    server = launcher.server("--clients", 2, *LONG)
    wait_for(server, "listening")
    client = launcher.client("--reconnect-timeout", 0)
    wait_for(client, "waiting for 1 of 2 clients")
    send_signal(client, signal.SIGSTOP)
    send_signal(server, signal.SIGINT)
    # Refused, or reset while it closes its socket: then it has heard the first.
    with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
        while True:
            socket.create_connection(("127.0.0.1", launcher.port)).close()
    send_signal(server, signal.SIGINT)
    assert server.ended_with(3) == "run_server.py: error: interrupted twice"
    send_signal(client, signal.SIGCONT)
    client.ended_with(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_client_is_waited_for(launcher: Launcher, number: int) -> None:
    server, clients = start_long_run(launcher)
    send_signal(clients[1], number)
    assert clients[1].ended_with(3) == "run_client.py: error: interrupted"
    why = "client_1 left: it was interrupted"
    wait_for(server, f"client_1 is away: {why}")
    wait_for(clients[0], f"waiting for client_1 ({why})")
    done = server.out.count("training loss")
    launcher.client("--client-id", 1)
    wait_for(server, f"round {done + 2}/1000")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_leaves_while_others_train_is_noticed_at_once(
    launcher: Launcher, number: int
) -> None:
    """It has done its own part of the round, and nobody waits for a message of its."""
    options = ["--partition", "sizes:0.001,0.999", "--local-epochs", 200, "--rounds", 2]
    server = launcher.server("--clients", 2, *FAST, *options, "--keep-tensors", "none")
    clients = [launcher.client("--client-id", k, "--keep-tensors", "all") for k in range(2)]
    own = "client/*/client_0/client_files/client_0/round_000/labels_0_199.pt"
    while not list(launcher.folder.glob(own)):
        server.process.join(0.02)
        assert server.process.is_alive(), server.err
    send_signal(clients[0], number)
    wait_for(server, "client_0 is away")
    wait_for(clients[1], "waiting for client_0")


def test_a_killed_server_ends_clients_that_do_not_wait(launcher: Launcher) -> None:
    server, clients = start_long_run(launcher, 2, "--reconnect-timeout", 0)
    send_signal(server, signal.SIGKILL)
    for client in clients:
        assert "error: the server closed the connection" in client.ended_with(1)


def test_a_client_gives_up_a_server_that_does_not_come_back(launcher: Launcher) -> None:
    server, (client,) = start_long_run(launcher, 1, "--reconnect-timeout", 1)
    send_signal(server, signal.SIGKILL)
    line = client.ended_with(1)
    assert f"no server at 127.0.0.1:{launcher.port} within 1 seconds" in line
    assert "see --server and --reconnect-timeout" in line
    assert "the server closed the connection; trying for 1 seconds to reach" in client.out


def test_a_server_interrupted_while_it_waits_ends_the_clients_that_wait(launcher: Launcher) -> None:
    server, client = launcher.server("--clients", 2), launcher.client()
    wait_for(client, "waiting for 1 of 2 clients")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    assert client.ended_with(1).endswith("the server stopped: it was interrupted")


def test_a_client_that_leaves_before_the_start_can_come_back(launcher: Launcher) -> None:
    server = launcher.server("--clients", 3, "--rounds", 1, *FAST)
    stays, leaves = launcher.client("--client-id", 0), launcher.client("--client-id", 2)
    wait_for(stays, "waiting for 1 of 3 clients: 1")
    send_signal(leaves, signal.SIGINT)
    leaves.ended_with(3)
    wait_for(server, "client_2 is away: client_2 left: it was interrupted")
    wait_for(stays, "waiting for 2 of 3 clients: 1, 2")
    others = [launcher.client("--client-id", k) for k in (2, 1)]
    for program in (server, stays, *others):
        program.ended_with(0)


def test_clients_too_many_or_of_a_taken_id_are_turned_away_and_the_run_goes_on(
    launcher: Launcher,
) -> None:
    server = launcher.server("--clients", 2, "--rounds", 2, *FAST)
    first = launcher.client("--client-id", 1)
    wait_for(first, "waiting for 1 of 2 clients: 0")
    taken = launcher.client("--client-id", 1).ended_with(1)
    assert "the server refused: --client-id 1 is taken" in taken
    outside = launcher.client("--client-id", 2).ended_with(1)
    assert "the server refused: --client-id 2: this run has the ids 0 to 1" in outside
    last = launcher.client()
    wait_for(last, "client_0 of run")
    too_many = launcher.client().ended_with(1)
    assert "the server refused: the run" in too_many
    assert too_many.endswith("has its 2 clients")
    for program in (server, first, last):
        program.ended_with(0)


def test_strangers_on_the_port_do_not_disturb_a_run(launcher: Launcher) -> None:
    server = launcher.server("--clients", 1, "--rounds", 2, *FAST)
    wait_for(server, "listening")
    strangers = [
        b"GET / HTTP/1.1\r\n\r\n",
        pack_head(2**31, 0),
        pack_head(10, 2**62),
        pack_head(2, 0, crc=crc32(b"{}")) + b"{}",
        b"SFL\n",
        b"",
    ]
    for sent in strangers:
        with socket.create_connection(("127.0.0.1", launcher.port)) as sock:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    with socket.create_connection(("127.0.0.1", launcher.port)):  # says nothing, and stays
        launcher.client().ended_with(0)
        server.ended_with(0)
    log = next(launcher.folder.glob("server/*/server_log.txt")).read_text()
    assert log.count("turned away") >= len(strangers)


def test_a_run_whose_name_exists_is_refused_and_left_alone(launcher: Launcher) -> None:
    folder = launcher.folder / "server" / "taken"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    line = launcher.server("--run", "taken").ended_with(2)
    why = f"run_server.py: error: a run taken exists in {folder.parent}; give another --run"
    assert line == f"{why}, or go on with it by --resume {folder}"
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_port_in_use_leaves_no_folder(launcher: Launcher) -> None:
    with socket.create_server(("127.0.0.1", launcher.port)):
        line = launcher.server().ended_with(1)
    assert f"cannot listen on 127.0.0.1:{launcher.port}: Address already in use" in line
    assert not (launcher.folder / "server").exists()


def test_a_client_waits_for_its_server_and_gives_up(launcher: Launcher) -> None:
    client = launcher.client("--connect-timeout", 0.5)
    line = client.ended_with(1)
    assert f"no server at 127.0.0.1:{launcher.port} within 0.5 seconds" in line
    assert client.out.startswith("waiting for the server at")
    late = launcher.client()
    wait_for(late, "waiting for the server at")
    launcher.server("--clients", 1, "--rounds", 1, *FAST).ended_with(0)
    late.ended_with(0)


def test_a_host_that_does_not_exist_is_said(launcher: Launcher) -> None:
    client = launcher.client("--server", "no.such.host.invalid:80", "--connect-timeout", 1)
    line = client.ended_with(1)
    assert "no.such.host.invalid" in line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "lenet"], "unknown model 'lenet'; did you mean lenet5"),
        (
            ["--dataset", "mnits"],
            "unknown data set 'mnits'; did you mean mnist or emnist or femnist?",
        ),
        (["--rounds", 0], "--rounds 0: must be at least 1"),
        (["--cut", 12], "lenet5 has 12: conv1, relu1"),
        (["--cut", 0], "needs blocks on both sides"),
        (["--weights", "s3://bucket/x"], "unknown weight store"),
        (["--scheme", "sflv4"], "unknown scheme 'sflv4'; did you mean sflv"),
        (["--scheme", "central"], "one process: python -m experiments.simulate"),
        (["--participation", 0], "--participation 0.0: must be in (0, 1]"),
        (["--clip-norm", -1], "--clip-norm -1.0: must be 0 or more"),
        (["--aggregation", "fedavgn"], "did you mean fedavg"),
        (["--aggregation", "fedadam:lr=x"], "lr must be of type float"),
        (["--aggregation", "fedadam:eta=1"], "no option 'eta'; it has lr, beta1, beta2, tau"),
        (["--aggregation", "krum:faulty=1"], "wanted: 2 faulty + 2 below 3 models"),
        (["--aggregation", "trimmed-mean:trim=2"], "wanted: trim of 3 models below 1.5"),
        (["--lr-schedule", "step:every=0"], "wanted: every at least 1"),
        (["--lr-schedule", "linear"], "unknown lr-schedule 'linear'"),
        (["--max-clients", 2], "--max-clients 2: must be at least --clients"),
        (["--max-clients", 4], "more can join with --partition own alone"),
        (["--optimizer", "adma"], "did you mean adam?"),
    ],
)
def test_bad_options_end_with_2(launcher: Launcher, options: list[object], reason: str) -> None:
    assert reason in launcher.server(*options).ended_with(2)
    assert list(launcher.folder.glob("server/*")) == []


def test_clients_train_on_their_own_data(launcher: Launcher) -> None:
    server = launcher.server(*OWN, "--rounds", 4, "--batch-size", 8)
    for k, count in ((0, 40), (1, 120)):
        folder = write_own(launcher.folder / f"own{k}", count=count)
        launcher.client("--client-id", k, "--data-dir", folder)
    for program in launcher.programs:
        program.ended_with(0)
    assert "client_1 is ready: 96 train, 24 validation, 0 test samples" in server.out
    assert "validation accuracy 1.0000" in server.out
    assert "no client has a test set" in server.out


def test_too_little_disk_is_said_before_the_first_step(launcher: Launcher) -> None:
    """The digits' tensors of 100 million rounds fit on no disk."""
    server = launcher.server("--clients", 1, "--rounds", 100_000_000)
    client = launcher.client()
    line = server.ended_with(1)
    assert "of disk;" in line
    assert "MB are free: give --keep-tensors last or none" in line
    client.ended_with(1)
    assert not (next(launcher.folder.glob("server/*")) / "client_files").exists()


@pytest.mark.slow
def test_the_same_port_serves_the_next_run_at_once_and_clients_share_no_folder(
    launcher: Launcher,
) -> None:
    for name in ("one", "two"):
        server = launcher.server("--clients", 3, "--rounds", 1, "--run", name, *FAST)
        clients = [launcher.client() for _ in range(3)]
        for program in (server, *clients):
            program.ended_with(0)
        folders = sorted(path.name for path in (launcher.folder / "client" / name).iterdir())
        assert folders == ["client_0", "client_1", "client_2"]


@pytest.mark.slow
def test_two_runs_at_once_do_not_touch_each_others_files(tmp_path: Path) -> None:
    results: dict[int, Path] = {}
    out = ["--out", tmp_path / "shared"]

    def run(number: int) -> None:
        (tmp_path / f"logs{number}").mkdir()
        launcher = Launcher(tmp_path / f"logs{number}")
        server = launcher.server("--clients", 2, "--rounds", 2, "--seed", 1, *FAST, *out)
        for program in [server, *(launcher.client("--client-id", k, *out) for k in range(2))]:
            program.ended_with(0)
        results[number] = Path(server.out.splitlines()[-1].removeprefix("the run lies in "))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] != results[1]
    names = [sorted(p.name for p in (run / "models").iterdir()) for run in results.values()]
    assert names[0] == names[1]
    for name in names[0]:
        first, second = (run / "models" / name for run in results.values())
        assert first.read_bytes() == second.read_bytes()


def test_tensors_may_be_kept_on_the_client_too(launcher: Launcher) -> None:
    run = launcher.run("--rounds", 2, *FAST, clients=1, client_options=["--keep-tensors", "all"])
    own = launcher.folder / "client" / "r" / "client_0" / "client_files"
    theirs = run / "client_files"
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (own, theirs)]
    assert names[0] == names[1]
    assert len(names[0]) > 30
    for path in theirs.rglob("*.pt"):
        assert path.read_bytes() == (own / path.relative_to(theirs)).read_bytes()
