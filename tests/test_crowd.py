"""Fewer cores than programs: nobody looks while waiting, and clients let their server go first."""

import functools
import os
import time
from pathlib import Path

import pytest
import torch

from sfl import crowd, simulate
from sfl.client_store import Access
from sfl.config import ClientNode, RunConfig
from sfl.crowd import LOWEST_PRIORITY, is_crowded
from sfl.driver import Network
from sfl.link import Link
from sfl.machine import Machine
from sfl.protocol import Limits, MessageType
from sfl.shaping import LinkShape
from sfl.stream import Stream
from sfl.switchboard import Switchboard
from sfl.transport import Connection, connect, listen
from tests.launch import TIMEOUT_S, Launcher
from tests.test_equivalence import assert_equal, simulated, weights

LIMITS = Limits()


def test_programs_are_counted_against_the_cores_that_they_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert [is_crowded(count) for count in (1, 2, 3)] == [False, False, True]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert [is_crowded(count) for count in (1, 2)] == [False, True]


def dial(port: int, shape: str = "") -> Connection:
    return connect(
        "127.0.0.1", port, timeout_s=5, connect_timeout_s=5, limits=LIMITS, on_wait=print,
        shape=LinkShape.parse(shape),
    )  # fmt: skip


def admitted(board: Switchboard, client: Connection, *, so_many: int) -> None:
    client.send_message_as_json(MessageType.REGISTER)
    assert board.until(lambda: len(board.connections) == so_many, timeout_s=5)


def test_a_server_looks_while_everyone_on_its_machine_has_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crowd, "num_cores", lambda: 2)
    listener = listen("127.0.0.1", 0)
    with Switchboard(listener, timeout_s=5, limits=LIMITS) as board:
        spinner = board._drain.spinner
        with dial(listener.port) as one, dial(listener.port) as other:
            assert one.is_local
            admitted(board, one, so_many=1)
            assert spinner.looks
            admitted(board, other, so_many=2)
            assert not spinner.looks
            board.drop(board.connections[0], "too many")
            assert spinner.looks


@pytest.mark.parametrize(
    ("clients", "num_hosted", "link", "shares"),
    [(30, 0, "", True), (3, 0, "", False), (30, 10, "", False), (30, 9, "", True),
     (30, 0, "100mbit,1ms", False)],
)  # fmt: skip
def test_a_client_sleeps_where_all_clients_processes_and_the_server_have_too_few_cores(
    monkeypatch: pytest.MonkeyPatch, clients: int, num_hosted: int, link: str, shares: bool
) -> None:
    """The server is not on this machine if the link to it is a played one."""
    monkeypatch.setattr(crowd, "num_cores", lambda: 4)
    machine = Machine(Access.of(ClientNode()), torch.device("cpu"), num_hosted=num_hosted)
    with listen("127.0.0.1", 0) as listener, dial(listener.port, link) as client:
        assert machine.share_cores(client, RunConfig(clients=clients)) == shares
        assert client.spinner.looks == (not shares)


def test_a_server_looks_while_no_more_clients_train_at_once_than_have_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crowd, "num_cores", lambda: 2)
    listener = listen("127.0.0.1", 0)
    with (
        Switchboard(listener, timeout_s=5, limits=LIMITS) as board,
        dial(listener.port) as one,
        dial(listener.port) as other,
    ):
        admitted(board, one, so_many=1)
        admitted(board, other, so_many=2)
        looks = []
        for at_once in (1, 2, 0):
            board.expect(at_once)
            looks.append(board._drain.spinner.looks)
        assert looks == [True, False, False]


def test_a_client_looks_in_a_round_in_which_each_has_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crowd, "num_cores", lambda: 2)
    machine = Machine(Access.of(ClientNode()), torch.device("cpu"))
    with listen("127.0.0.1", 0) as listener, dial(listener.port) as client:
        for clients, looks in [(2, False), (1, True)]:
            machine.share_cores(client, RunConfig(clients=clients))
            client.expect_crowd(False)
            assert client.spinner.looks
            client.expect_crowd(True)
            assert client.spinner.looks == looks


def test_a_run_in_which_few_train_at_once_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"clients": 3, "rounds": 2, "model": "mlp"}
    expected = weights(simulated(tmp_path / "all", **options))
    told: list[int] = []
    heard: list[bool] = []
    monkeypatch.setattr(crowd, "num_cores", lambda: 2)
    monkeypatch.setattr(simulate, "prepare", functools.partial(simulate.prepare, at_once=1))
    monkeypatch.setattr(Network, "expect", lambda network, at_once: told.append(at_once))
    monkeypatch.setattr(Link, "expect_crowd", lambda link, crowded: heard.append(crowded))
    assert_equal(weights(simulated(tmp_path / "few", **options)), expected)
    assert told == [1, 0] * 2  # between rounds all may
    assert heard == [False, True] * 6


def test_a_peer_at_another_address_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as listener, dial(listener.port) as client:
        stream = Stream(client._stream.sock)
        assert stream.is_local
        monkeypatch.setattr(type(stream.sock), "getpeername", lambda sock: ("192.0.2.7", 9))
        assert not stream.is_local


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize(
    ("cores", "options", "gives_way"),
    [(1, [], True), (1, ["--give-way", "never"], False), (2, [], False)],
)
def test_a_client_gives_way_to_a_server_that_it_shares_too_few_cores_with(
    launcher: Launcher, tmp_path: Path, cores: int, options: list[str], gives_way: bool
) -> None:
    ours = sorted(os.sched_getaffinity(0))
    if len(ours) < cores:
        pytest.skip("too few cores")
    client = launcher.client("--client-ids", "0", *options)
    pid = client.process.pid
    assert pid is not None
    for thread in os.listdir(f"/proc/{pid}/task"):  # the others will inherit it
        os.sched_setaffinity(int(thread), ours[:cores])
    server = launcher.server("--clients", 1, "--run", "r", "--model", "mlp", "--rounds", 500)
    log = tmp_path / "client/r/client_0/client_log.txt"
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.exists() and "samples; mlp" in log.read_text()):
        assert time.monotonic() < deadline, client.out + client.err
        time.sleep(0.05)
    assert ("goes first" in log.read_text()) == gives_way
    priorities = [os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir(f"/proc/{pid}/task")]
    assert (LOWEST_PRIORITY in priorities) == gives_way
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert server.process.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, server.process.pid) == here
