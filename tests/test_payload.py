"""Large payloads go onto disk while they come in: the same bytes, little memory, clear errors."""

import importlib
import os
import random
import runpy
import socket
import sys
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfl.config import RunConfig
from sfl.errors import ConnectionLost, Damaged, RunError
from sfl.files import checksum as crc
from sfl.files.checksum import checksum
from sfl.files.torch_file import max_state_bytes
from sfl.runtime.lobby import Lobby, Patience
from sfl.runtime.preflight import check_run, disk_bytes
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.connection import Connection
from sfl.transport.guard import Terms
from sfl.transport.listener import listen
from sfl.transport.tcp_server import TcpServer
from sfl.wire import payload
from sfl.wire.framing import encode_head
from sfl.wire.messages import Limits, Message, MessageType
from sfl.wire.payload import InMemory, MakeStore, OnDisk, Store, payload_store_in
from tests.support.launch import Launcher
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights

SIZE = 2_500_001  # two whole chunks, and a part of a third


@pytest.fixture
def data() -> bytes:
    return os.urandom(SIZE)


def fill(store: Store, data: bytes, most: int) -> None:
    view = memoryview(data)
    while view:
        buffer = store.get_buffer()
        assert len(buffer) > 0
        num_bytes = min(len(buffer), len(view), most)
        buffer[:num_bytes] = view[:num_bytes]
        store.advance(num_bytes)
        view = view[num_bytes:]


@pytest.mark.parametrize("most", [100_003, 10**7])
@pytest.mark.parametrize("on_disk", [True, False])
def test_what_came_is_there(data: bytes, tmp_path: Path, most: int, on_disk: bool) -> None:
    store = OnDisk(SIZE, tmp_path) if on_disk else InMemory(SIZE)
    fill(store, data[:-10], most)
    assert len(store.get_buffer()) == 10  # what follows is of another message
    fill(store, data[-10:], most)
    found, crc = store.finish()
    assert found == data
    assert crc == zlib.crc32(data)
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_disk_that_takes_little_at_a_time_gets_all(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(payload.os, "write", lambda to, part: write(to, part[:99_999]))
    store = OnDisk(SIZE, tmp_path)
    fill(store, data, SIZE)
    assert store.finish()[0] == data


def test_a_payload_that_is_whole_holds_nothing_but_its_mapping(data: bytes, tmp_path: Path) -> None:
    store = OnDisk(SIZE, tmp_path)
    fill(store, data, SIZE)
    assert store._close.alive
    store.finish()
    assert not store._close.alive


def test_only_large_payloads_go_onto_disk(tmp_path: Path) -> None:
    make = payload_store_in(tmp_path)
    assert isinstance(make(payload.LARGE_BYTES - 1), InMemory)
    assert isinstance(make(payload.LARGE_BYTES), OnDisk)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def pass_on(
    ends: tuple[socket.socket, socket.socket], data: bytes, of: str, store: MakeStore
) -> memoryview:
    """Send a file from a thread, and return what the other end received."""
    limits = Limits(payload_bytes={MessageType.SEND_MODEL: SIZE}, store=store)
    sender, receiver = (Connection(end, timeout_s=30, limits=limits) for end in ends)
    sending = threading.Thread(
        target=sender.send_file, args=[MessageType.SEND_MODEL, data], kwargs={"checksum": of}
    )
    sending.start()
    try:
        return memoryview(receiver.receive_file(MessageType.SEND_MODEL).payload)
    finally:
        receiver.close()
        sender.close()
        sending.join()


def test_a_connection_receives_onto_disk(
    ends: tuple[socket.socket, socket.socket], data: bytes, tmp_path: Path
) -> None:
    found = pass_on(ends, data, checksum(data), lambda size: OnDisk(size, tmp_path))
    assert found == data
    assert found.readonly  # it is the file's own bytes, mapped


def test_damage_is_found_on_disk_as_well(
    ends: tuple[socket.socket, socket.socket], data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(Damaged):
        pass_on(ends, data, checksum(data[::-1]), lambda size: OnDisk(size, tmp_path))


def test_a_full_disk_is_said(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OnDisk(SIZE, tmp_path)

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(payload.os, "write", full)
    with pytest.raises(RunError, match=rf"cannot write to {tmp_path}: No space left on device"):
        fill(store, data, SIZE)


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write to .*gone: No such file"):
        OnDisk(SIZE, tmp_path / "gone")


def test_what_is_received_takes_no_memory(tmp_path: Path) -> None:
    """The one buffer, and no more, however large the payload."""
    import tracemalloc

    store = OnDisk(size := 200 * SIZE, tmp_path)
    data = os.urandom(SIZE)
    tracemalloc.start()
    for _ in range(200):
        fill(store, data, SIZE)
    found, _ = store.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == size
    assert peak < 2**20


def test_it_lies_in_the_folder_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    real = tempfile.TemporaryFile

    def note(*, dir: Path) -> object:
        folders.append(dir)
        return real(dir=dir)

    monkeypatch.setattr(payload.tempfile, "TemporaryFile", note)
    payload_store_in(tmp_path)(payload.LARGE_BYTES)
    assert folders == [tmp_path]


@pytest.mark.slow
def test_a_run_whose_payloads_all_go_onto_disk_gives_the_same_weights(
    launcher: Launcher, tmp_path: Path
) -> None:
    model = "tests.support.large_payloads:bn_dropout"
    server = launcher.server(
        "--clients", 2, "--run", "r", "--rounds", 2, "--batch-size", 64, "--model", model,
        "--cut", 4,
    )  # fmt: skip
    clients = [launcher.client("--client-id", k, "--allow-import", model) for k in range(2)]
    for program in [server, *clients]:
        program.ended_with(0)
    assert_equal(
        weights(tmp_path / "server/r"),
        weights(simulated(tmp_path / "simulated", model=BN_DROPOUT, cut=4, clients=2)),
    )
    for folder in ("server/r", "client/r/client_0", "client/r/client_1"):
        assert (tmp_path / folder / "went_onto_disk").exists()


def test_a_lost_client_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    begun: list[weakref.ref[OnDisk]] = []

    def store(num_bytes: int) -> Store:
        begun.append(weakref.ref(on_disk := OnDisk(num_bytes, tmp_path)))
        return on_disk

    limits = Limits(payload_bytes={MessageType.SEND_MODEL: SIZE}, store=store)
    listener = listen("127.0.0.1", 0)
    with TcpServer(listener, Terms(5, limits)) as board:
        with socket.create_connection(("127.0.0.1", listener.port)) as client:
            client.sendall(encode_head(Message(MessageType.REGISTER)))
            (link,) = board.wait_until(board.ready_members, 5)
            link.receive_message_as_json(MessageType.REGISTER)
            whole = Message(MessageType.SEND_MODEL, payload=bytes(SIZE))
            client.sendall(encode_head(whole) + bytes(SIZE // 2))
        assert board.wait_until(board.ready_members, 5) == [link]  # since it is lost
        assert begun[0]() is not None
        link.close()
        assert begun[0]() is None
        with pytest.raises(ConnectionLost, match="in the middle of a message's payload"):
            link.receive_file(MessageType.SEND_MODEL)


def test_what_comes_in_at_a_time_counts_as_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(clients=4, scheme="sflv1", participation=0.5, dataset="mnist", model="mlp")
    split = SplitModel(check_run(run), (1, 28, 28), 10)
    recipe = split.recipe
    before = disk_bytes(recipe, split, [100] * 4)
    monkeypatch.setattr("sfl.runtime.preflight.LARGE_BYTES", 2**10)
    front = max_state_bytes(split.front_spec)
    assert disk_bytes(recipe, split, [100] * 4) == before + 2 * front
    # A batch is no larger than a client's part, however large batches may be.
    huge = recipe.changed(batch_size=2**20)
    parts = [10_000, 100, 100, 100]
    monkeypatch.setattr("sfl.runtime.preflight.LARGE_BYTES", 2**50)
    before = disk_bytes(huge, split, parts)
    monkeypatch.setattr("sfl.runtime.preflight.LARGE_BYTES", front + 1)
    of_batch = split.features_spec(10_000).num_bytes
    assert disk_bytes(huge, split, parts) == before + of_batch // 2


def test_a_full_disk_is_no_fault_of_the_client() -> None:
    """Also where the server is not waiting for that client just then."""
    patience = Patience(may_return=True)
    lobby = Lobby(
        members=None, recipe=Recipe.of(RunConfig(clients=1)), events=None,
        resumed=False, fed="here", patience=patience,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(RunError, match="disk"):
        lobby.lost(0, RunError("cannot write: the disk is full"))


@pytest.mark.parametrize("module", ["isal.isal_zlib", "zlib"])
def test_a_checksum_is_the_same_with_isa_l_and_without(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    if module == "zlib":
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    crc32 = runpy.run_path(crc.__file__)["crc32"]
    assert crc32 is importlib.import_module(module).crc32
    for size in (0, 1, 15, 64, 1000, 70_001):
        data = random.Random(size).randbytes(size)
        assert crc32(data) == zlib.crc32(data)
        assert crc32(memoryview(data), 123) == zlib.crc32(data, 123)
