"""One contract for all stores of weights; and what only places do, real emulator included."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfl.errors import PEER_ERRORS, ConfigError, IntegrityError, ProtocolError, RunError, SflError
from sfl.files.checksum import checksum
from sfl.transport.connection import Connection
from sfl.weights.exchange import (
    AVERAGE,
    INITIAL,
    SocketWeights,
    WeightKey,
    WeightStore,
    client_weights,
)
from sfl.weights.object_store import Directory, ObjectStore
from sfl.weights.stored_weights import SharedWeights, describe, object_path
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.messages import MessageType
from tests.support.emulator import Gate
from tests.support.places import DATA, LIMITS, Said, bucket, directory, key

Places = Callable[[Path], ObjectStore]


@pytest.fixture(params=["dir", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, gate: Gate) -> ObjectStore:
    return directory(tmp_path) if request.param == "dir" else bucket(tmp_path)


@dataclass
class Ends:
    """Both ends of a store, as server and client have them."""

    server: WeightStore
    client: WeightStore
    links: tuple[Connection, Connection]


@pytest.fixture(params=["socket", "dir", "gs"])
def ends(request: pytest.FixtureRequest, tmp_path: Path, gate: Gate) -> Iterator[Ends]:
    sockets = socket.socketpair()
    with (
        Connection(sockets[0], timeout_s=5, limits=LIMITS) as ours,
        Connection(sockets[1], timeout_s=5, limits=LIMITS) as theirs,
    ):
        ours.name, ours.peer_name = "server", "client_1"
        theirs.name, theirs.peer_name = "client_1", "server"
        if request.param == "socket":
            yield Ends(SocketWeights(ours), SocketWeights(theirs), (ours, theirs))
            return
        made = directory if request.param == "dir" else bucket
        stores = [
            SharedWeights(made(tmp_path), link, Calls(), patience_s=5, say=Said())
            for link in (ours, theirs)
        ]
        yield Ends(*stores, (ours, theirs))


def both(give: Conversation[None], take: Conversation[bytes]) -> bytes:
    """Run the two sides at once; return what was taken."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            run_blocking(give)
        except BaseException as error:  # noqa: BLE001 - the thread's edge
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return run_blocking(take)
    finally:
        thread.join()
        assert failed == []


def run_quietly(conversation: Conversation[None]) -> None:
    with contextlib.suppress(SflError):
        run_blocking(conversation)


# The contract.


@pytest.mark.parametrize("data", [b"x", DATA])
def test_what_is_put_is_what_is_got(ends: Ends, data: bytes) -> None:
    assert both(ends.client.put(key(), data, 7), ends.server.get(key())) == data
    average = key(AVERAGE)
    assert both(ends.server.put(average, data), ends.client.get(average)) == data


def test_weights_of_another_client_are_passed_on(ends: Ends) -> None:
    both(ends.client.put(key(), DATA), ends.server.get(key()))
    assert both(ends.server.pass_on(key(), DATA), ends.client.get(key())) == DATA


def test_what_is_held_already_need_not_travel(ends: Ends) -> None:
    start = key(INITIAL, -1)
    sent = ends.links[0].counters.copy()
    assert both(ends.server.put(start, DATA), ends.client.get(start, DATA)) == DATA
    assert ends.links[0].counters.bytes_sent - sent.bytes_sent < 2000
    other = DATA[:-1] + b"!"
    assert (
        both(ends.server.put(key(INITIAL, 0), other), ends.client.get(key(INITIAL, 0), DATA))
        == other
    )


def test_many_rounds_and_clients_keep_apart(ends: Ends) -> None:
    for round_index in range(3):
        for k in range(2):
            data = f"{round_index} {k}".encode()
            which = key(client_weights(k), round_index)
            assert both(ends.client.put(which, data), ends.server.get(which)) == data


def test_other_weights_than_expected_are_refused(ends: Ends) -> None:
    giving = threading.Thread(target=lambda: run_quietly(ends.client.put(key("client_2"), b"x")))
    giving.start()
    with pytest.raises(ProtocolError, match="'client_2', not client_1"):
        run_blocking(ends.server.get(key("client_1")))
    ends.links[0].close()
    giving.join()


# Places.


def test_an_object_is_written_once(place: ObjectStore) -> None:
    place.check()
    assert place.read("r/round_000/client_0.pt") is None
    place.create("r/round_000/client_0.pt", DATA, {"a": "b"})
    place.create("r/round_000/client_0.pt", DATA, {"a": "b"})  # ours already: done
    with pytest.raises(RunError, match=r"client_0.pt is there already with other content.*crc32:"):
        place.create("r/round_000/client_0.pt", DATA[:-1] + b"?", {"a": "b"})
    assert place.read("r/round_000/client_0.pt") == (DATA, {"a": "b"})
    place.delete("r/round_000/client_0.pt")
    place.delete("r/round_000/client_0.pt")
    assert place.read("r/round_000/client_0.pt") is None


def test_of_two_that_race_for_an_object_one_wins(place: ObjectStore, tmp_path: Path) -> None:
    """Many times, on two threads: exactly one writer, and its content is what is there."""
    for attempt in range(5):
        path, outcomes = f"r/round_{attempt:03d}/client_0.pt", {}
        start = threading.Barrier(2)

        def write(
            who: bytes, path: str = path, outcomes: dict[bytes, str] = outcomes,
            start: threading.Barrier = start,
        ) -> None:  # fmt: skip
            start.wait()
            try:
                place.create(path, who * 1000, {"who": who.decode()})
                outcomes[who] = "won"
            except RunError as error:
                outcomes[who] = str(error)

        threads = [threading.Thread(target=write, args=(who,)) for who in (b"a", b"b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes.values())[1] == "won"
        (loser,) = [text for text in outcomes.values() if text != "won"]
        assert "another process writes as the same client" in loser
        (winner,) = [who for who, text in outcomes.items() if text == "won"]
        found = place.read(path)
        assert found is not None
        assert found[0] == winner * 1000


def shared(place: ObjectStore, patience_s: float = 0.3, say: Said | None = None) -> SharedWeights:
    return SharedWeights(place, None, Calls(), patience_s=patience_s, say=say or Said())


def test_weights_that_nobody_announces_are_looked_for(place: ObjectStore) -> None:
    def late() -> None:
        time.sleep(0.4)
        run_blocking(shared(place).put(key(), DATA))

    thread = threading.Thread(target=late)
    thread.start()
    assert run_blocking(shared(place, patience_s=20).get(key())) == DATA
    thread.join()


def test_weights_that_do_not_come_are_named(place: ObjectStore) -> None:
    with pytest.raises(RunError, match=r"r/round_003/client_1.pt did not come within 0.3 seconds"):
        run_blocking(shared(place).get(key()))


@pytest.mark.parametrize("is_folder", [False, True])
def test_who_announces_what_is_not_there_is_to_blame(tmp_path: Path, is_folder: bool) -> None:
    """Not the server, whose other clients go on: a plain ``RunError`` would end the run."""
    place, limits = directory(tmp_path), {"timeout_s": 5, "limits": LIMITS}
    if is_folder:
        (tmp_path / "shared" / object_path(key())).mkdir(parents=True)
    ours, theirs = socket.socketpair()
    with Connection(ours, **limits) as server, Connection(theirs, **limits) as client:
        content = {"name": "client_1", "checksum": checksum(DATA)}
        client.send_message_as_json(MessageType.WEIGHTS_STORED, content=content, at=key().at)
        server.peer_name = "client_1"
        taken = SharedWeights(place, server, Calls(), patience_s=0.3, say=Said())
        said = "is a folder" if is_folder else "within 0.3 seconds after client_1 stored it"
        with pytest.raises(PEER_ERRORS, match=said):
            run_blocking(taken.get(key()))


@pytest.mark.parametrize(
    ("theirs", "wanted"),
    [
        (key(run="other"), "is of run 'other', not 'r'"),
        (key(round_index=2), "is of round '2', not '3'"),
        (key("client_0"), "is of name 'client_0', not 'client_1'"),
    ],
)
def test_weights_of_something_else_are_never_taken(
    place: ObjectStore, theirs: WeightKey, wanted: str
) -> None:
    """Somebody copied them to where ours should lie."""
    place.create(object_path(key()), DATA, describe(theirs, DATA, 1))
    with pytest.raises(IntegrityError, match=wanted):
        run_blocking(shared(place).get(key()))


@pytest.mark.parametrize("altered", [DATA[:-100], DATA[:-1] + b"?"])
def test_weights_that_were_altered_are_named(place: ObjectStore, altered: bytes) -> None:
    place.create(object_path(key()), altered, describe(key(), DATA, 1))
    with pytest.raises(IntegrityError, match=r"r/round_003/client_1.pt: is damaged"):
        run_blocking(shared(place).get(key()))


def test_weights_larger_than_the_model_are_not_read(place: ObjectStore) -> None:
    run_blocking(shared(place).put(key(), DATA))
    store = SharedWeights(place, None, Calls(), patience_s=1, say=Said(), most_bytes=len(DATA) - 1)
    with pytest.raises(IntegrityError, match=r"client_1.pt: has 300000 bytes, at most 299999 are"):
        run_blocking(store.get(key()))


def test_objects_are_listed_by_how_their_paths_begin(place: ObjectStore) -> None:
    for path in ("r/starts/000000_000002", "r/starts/000002_000004", "r/x.pt", "s/starts/1"):
        place.create(path, b"x", {"a": "b"})
    assert place.names("r/starts/") == ["r/starts/000000_000002", "r/starts/000002_000004"]
    assert place.names("nothing/") == []


def test_a_folder_without_hard_links_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    place = directory(tmp_path)
    test_an_object_is_written_once(place)
    place.create("r/y.pt", DATA, {"a": "b"})
    place.delete("r/y.pt")
    assert not [*tmp_path.rglob("*y.pt*")]
    place.create("r/y.pt", b"other", {"a": "b"})  # as a resumed run does

    def killed(path: Path, to: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            place.create("r/z.pt", DATA, {"a": "b"})
    place.create("r/z.pt", DATA, {"a": "b"})
    assert place.read("r/z.pt") == (DATA, {"a": "b"})


def test_who_may_not_overwrite_may_find_its_own(gate: Gate, tmp_path: Path) -> None:
    """A refusal that comes before the precondition is looked at."""
    place = bucket(tmp_path)
    place.create("r/x.pt", DATA, {"a": "b"})
    gate.faults = lambda request: (403, "forbidden") if request.uploads else None
    place.create("r/x.pt", DATA, {"a": "b"})
    with pytest.raises(RunError, match="is there already with other content"):
        place.create("r/x.pt", b"other", {"a": "b"})


def test_one_bucket_serves_call_after_call(gate: Gate, tmp_path: Path) -> None:
    place = bucket(tmp_path)
    for number in range(3):
        place.create(f"r/{number}.pt", b"x", {})
    assert place._free.qsize() == 1


@pytest.mark.parametrize("host", ["127.0.0.1:9023", "http://127.0.0.1:9023/"])
def test_an_emulators_address_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    with pytest.raises(ConfigError, match="give it a scheme, and no slash at the end"):
        bucket(tmp_path).check()


def test_objects_say_what_they_are(place: ObjectStore) -> None:
    run_blocking(shared(place).put(key("client_2", 11), DATA, 480))
    found = place.read("r/round_011/client_2.pt")
    assert found is not None
    assert found[1] == {
        "run": "r", "round": "11", "name": "client_2", "client": "2", "samples": "480",
        "checksum": checksum(DATA),
    }  # fmt: skip
    assert object_path(key(AVERAGE, 0)) == "r/round_000/client_avg.pt"


def test_a_half_written_file_of_a_folder_is_not_seen(tmp_path: Path) -> None:
    place = directory(tmp_path)
    place.check()
    folder = tmp_path / "shared/r/round_003"
    folder.mkdir(parents=True)
    (folder / ".client_1.pt.0.tmp").write_bytes(DATA[:10])
    about = json.dumps(dict(describe(key(), DATA, 1)), sort_keys=True)
    (folder / "client_1.pt.about").write_text(about)
    assert place.read(object_path(key())) is None
    run_blocking(shared(place).put(key(), DATA, 1))
    assert run_blocking(shared(place).get(key())) == DATA


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = Directory(str(tmp_path / "file" / "folder"))
    with pytest.raises(RunError, match=r"cannot use dir:.*Not a directory"):
        place.check()
    with pytest.raises(RunError, match="cannot write dir:"):
        place.create("r/x.pt", b"", {})


# The layer in front of the emulator.
