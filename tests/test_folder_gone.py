"""A run's folder that is removed or renamed in mid-run is missed at the next round."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Launcher, free_port, wait_for
from tests.support.runs import FAST, LONG, removed, start_long_run


def renamed(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    """Put a copy in its place, as some editors do."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    os.replace(copy, path)


def linked(path: Path) -> None:
    """Move it to another disk, say, and leave a link: what is written arrives, a reader refuses."""
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


SERVERS = [
    (removed, ""), (renamed, ""), (removed, "server_log.txt"), (renamed, "server_log.txt"),
    (replaced, "server_log.txt"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "what"), SERVERS)
def test_a_server_misses_its_folder_and_all_hear_why(
    launcher: Launcher, do: Callable[[Path], None], what: str
) -> None:
    server, clients = start_long_run(launcher)
    (run,) = launcher.folder.glob("server/*")
    do(run / what)
    why = f"{run / what} is gone: it was removed or renamed while the run went on"
    assert server.ended_with(1) == f"run_server.py: error: {why}"
    for client in clients:  # at once, though they could try to reach the server for ten minutes
        assert client.ended_with(1) == f"run_client.py: error: the server ended the run: {why}"


@pytest.mark.parametrize("what", ["models", "client_files", "checkpoints", "rounds"])
def test_a_server_misses_a_folder_in_its_own(launcher: Launcher, what: str) -> None:
    server = launcher.server("--clients", 1, *FAST, "--rounds", 1000, "--keep-tensors", "last")
    client = launcher.client()
    wait_for(server, "round 2/1000")
    (run,) = launcher.folder.glob("server/*")
    linked(run / what)
    why = f"{run / what} is gone: it was removed or renamed while the run went on"
    assert server.ended_with(1) == f"run_server.py: error: {why}"
    client.ended_with(1)


@pytest.mark.parametrize("what", ["", "client_log.txt"])
def test_a_client_misses_its_folder_and_ends_alone(launcher: Launcher, what: str) -> None:
    server, clients = start_long_run(launcher)
    (run,) = launcher.folder.glob("client/*")
    renamed(run / "client_1" / what)
    why = f"{run / 'client_1' / what} is gone: it was removed or renamed while the run went on"
    assert clients[1].ended_with(1) == f"run_client.py: error: {why}"
    wait_for(server, f"client_1 is away: client_1 stopped: {why}")
    if not what:
        renamed_back = run / "elsewhere"
        renamed_back.rename(run / "client_1")
    launcher.client("--client-id", 1)
    wait_for(server, "client_1 is back")


def test_a_fed_server_misses_its_folder(launcher: Launcher) -> None:
    fed_port = free_port()
    fed = launcher.fed("--port", fed_port)
    server = launcher.server(
        "--role",
        "main",
        "--fed-server",
        f"127.0.0.1:{fed_port}",
        "--clients",
        1,
        "--run",
        "r",
        *LONG,
    )
    client = launcher.client("--client-id", 0)
    wait_for(fed, "round 2/1000")
    renamed(launcher.folder / "fed/r")
    assert "fed/r is gone" in fed.ended_with(1)
    assert "fed/r is gone" in client.ended_with(1)
    assert "fed/r is gone" in server.ended_with(1)


@pytest.mark.parametrize("what", ["rounds.csv", "manifest.jsonl"])
def test_a_server_misses_what_it_appends_to(launcher: Launcher, what: str) -> None:
    server, clients = start_long_run(launcher, 1, "--reconnect-timeout", 0)
    (run,) = launcher.folder.glob("server/*")
    (run / what).unlink()
    for line in (server.ended_with(1), clients[0].ended_with(1)):
        assert f"cannot write to {run}: " in line
        assert f"{run / what}" in line


@pytest.mark.slow
def test_the_log_is_missed_in_the_last_round_too(launcher: Launcher) -> None:
    """Before the clients are told that all went well."""
    options = [*FAST, "--rounds", 1, "--local-epochs", 40, "--keep-tensors", "none", "--run", "r"]
    server = launcher.server("--clients", 1, *options)
    client = launcher.client()
    run = launcher.folder / "server/r"
    while not (run / "checkpoints/round_000.json").exists():  # the round begins
        server.process.join(0.02)
        assert server.process.is_alive(), server.err
    renamed(run / "server_log.txt")
    assert "server_log.txt is gone" in server.ended_with(1)
    assert "the server ended the run" in client.ended_with(1)
