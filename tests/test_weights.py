"""One contract for all stores of weights; and what only places do, real emulator included."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sfl.errors import PEER_ERRORS, ConfigError, IntegrityError, ProtocolError, RunError, SflError
from sfl.files.checksum import checksum
from sfl.transport.connection import Connection
from sfl.values import Position
from sfl.weights.bucket import Bucket, parse_address
from sfl.weights.exchange import (
    AVERAGE,
    INITIAL,
    SocketWeights,
    WeightKey,
    WeightStore,
    client_weights,
)
from sfl.weights.objects import Directory, ObjectStore
from sfl.weights.shared import SharedWeights, describe, object_path
from sfl.weights.stores import check_address, open_place
from sfl.wire.calls import Calls
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.messages import Limits, MessageType
from tests.support.emulator import BUCKET, DROP, STALL, Emulator, Fault, Gate, Request, emulated

LIMITS = Limits(
    payload_bytes=dict.fromkeys((MessageType.SEND_MODEL, MessageType.SEND_AGGREGATED_MODEL), 10**6)
)
PREFIX = f"gs://{BUCKET}/weights"
DATA = os.urandom(300_000)


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Emulator, Gate]]:
    with emulated(tmp_path_factory.mktemp("cloud")) as both:
        yield both


@pytest.fixture
def gate(cloud: tuple[Emulator, Gate], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A bucket that behaves; faults that a test sets end with it."""
    gate = cloud[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gate.address)
    gate.log.clear()
    yield gate
    gate.faults = lambda request: None


@dataclass
class Said:
    """What a store said to people."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def bucket(tmp_path: Path, timeout_s: float = 20.0, say: Said | None = None) -> Bucket:
    address = f"{PREFIX}/{tmp_path.name}"
    return Bucket(address, tmp_path / "scratch", timeout_s=timeout_s, say=say or Said())


def directory(tmp_path: Path) -> Directory:
    return Directory(str(tmp_path / "shared"))


Places = Callable[[Path], ObjectStore]


@pytest.fixture(params=["dir", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, gate: Gate) -> ObjectStore:
    return directory(tmp_path) if request.param == "dir" else bucket(tmp_path)


def key(name: str = "client_1", round_index: int = 3, run: str = "r") -> WeightKey:
    return WeightKey(name, Position(run, round_index, -1, 1))


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


# The bucket, and what goes wrong with it.


def lost_answers(matching: Callable[[Request], bool], times: int = 1) -> Callable[[Request], Fault]:
    left = [times]

    def fault(request: Request) -> Fault:
        if left[0] and matching(request):
            left[0] -= 1
            return DROP
        return None

    return fault


@pytest.mark.parametrize("size", [300_000, 9 * 2**20])  # multipart, resumable
def test_an_upload_whose_answer_got_lost_counts(gate: Gate, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    place = bucket(tmp_path)

    def last_part(request: Request) -> bool:
        multipart = bool(request.uploads) and request.query["uploadType"] == ["multipart"]
        return multipart or request.method == "PUT"

    gate.faults = lost_answers(last_part)
    place.create("r/round_000/client_0.pt", data, {"a": "b"})
    assert place.read("r/round_000/client_0.pt") == (data, {"a": "b"})
    uploads = [line for line in gate.log if "client_0.pt" in line and line.startswith("POST")]
    assert len(uploads) + sum(line.startswith("PUT") for line in gate.log) >= 2


def test_an_upload_whose_answer_got_lost_to_another_one_is_an_error(
    gate: Gate, tmp_path: Path
) -> None:
    place = bucket(tmp_path)
    place.create("r/x.pt", b"theirs", {})
    gate.faults = lost_answers(lambda request: bool(request.uploads))
    with pytest.raises(RunError, match="is there already with other content"):
        place.create("r/x.pt", b"ours", {})


def test_a_deletion_whose_answer_got_lost_counts(gate: Gate, tmp_path: Path) -> None:
    place = bucket(tmp_path)
    place.create("r/x.pt", b"x", {})
    gate.faults = lost_answers(lambda request: request.method == "DELETE")
    place.delete("r/x.pt")
    assert place.read("r/x.pt") is None
    assert sum(line.startswith("DELETE") for line in gate.log) == 2


def of_object(request: Request) -> bool:
    """The library asks for other things, too, on threads of its own."""
    return "x.pt" in request.path + request.uploads


def failing(status: int, times: int) -> Callable[[Request], Fault]:
    left = [times]

    def fault(request: Request) -> Fault:
        left[0] -= of_object(request)
        return (status, "busy") if of_object(request) and left[0] >= 0 else None

    return fault


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_bucket_that_stutters_is_asked_again(gate: Gate, tmp_path: Path, status: int) -> None:
    said = Said()
    place = bucket(tmp_path, say=said)
    gate.faults = failing(status, 2)
    place.create("r/x.pt", DATA, {})
    gate.faults = failing(status, 1)
    assert place.read("r/x.pt") == (DATA, {})
    assert len(said.lines) == 2  # once for each time that it stayed away
    assert said.lines[0].startswith(f"{PREFIX}/{tmp_path.name} does not answer (")
    assert said.lines[0].endswith("trying again for 20 seconds")


def test_a_bucket_that_says_nothing_is_asked_again(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.weights.bucket.ANSWER_S", 0.3)
    said = Said()
    place = bucket(tmp_path, say=said)
    for call in (lambda: place.create("r/x.pt", DATA, {}), lambda: place.read("r/x.pt")):
        left = [1]

        def stall_once(request: Request, left: list[int] = left) -> Fault:
            return STALL if of_object(request) and left and left.pop() else None

        gate.faults = stall_once
        call()
    assert place.read("r/x.pt") == (DATA, {})
    assert ["timed out" in line for line in said.lines] == [True, True]


@pytest.mark.parametrize("how", ["refused", "503", "silent"])
def test_the_deadline_is_ours(
    gate: Gate, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.weights.bucket.ANSWER_S", 0.5)
    place, started = bucket(tmp_path, timeout_s=1.5), time.monotonic()
    place.check()
    gate.faults = (lambda request: STALL) if how == "silent" else failing(503, 10**9)
    if how == "refused":
        gate.stop()
    try:
        for call in (lambda: place.create("r/x.pt", b"x", {}), lambda: place.read("r/x.pt")):
            with pytest.raises(RunError, match=r"did not answer for 1.5 seconds.*can be resumed"):
                call()
    finally:
        if how == "refused":
            gate.start()
    assert time.monotonic() - started < 10


def test_no_permission_is_one_line(gate: Gate, tmp_path: Path) -> None:
    gate.faults = lambda request: (403, "forbidden")
    for call in (
        lambda: bucket(tmp_path).check(),
        lambda: bucket(tmp_path).create("r/x.pt", b"x", {}),
        lambda: bucket(tmp_path).read("r/x.pt"),
    ):
        with pytest.raises(RunError, match=r"no permission to .*Storage Object Creator") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_no_such_bucket_is_one_line(gate: Gate, tmp_path: Path) -> None:
    place = Bucket("gs://no-such-bucket/x", tmp_path, timeout_s=5, say=Said())
    with pytest.raises(RunError, match="there is no bucket 'no-such-bucket'"):
        place.check()


def test_no_credentials_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no credentials for gs://"):
        bucket(tmp_path).check()


@pytest.mark.parametrize("name", ["", "a", "Upper", "-x-", "sp ace", "goog-x", "x" * 300])
def test_a_name_that_is_no_buckets_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a bucket"):
        check_address(f"gs://{name}/prefix")


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("socke", "did you mean socket"),
        ("dir:", "give a folder, dir:PATH"),
        ("gs:bucket", "give gs://BUCKET/PREFIX"),
        ("s3://bucket", "unknown weight store"),
        ("gs://bucket/../x", "is no prefix"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        check_address(address)


def test_addresses_are_taken_apart(tmp_path: Path) -> None:
    assert parse_address("gs://my-bucket") == ("my-bucket", "")
    assert parse_address("gs://my-bucket/a/b/") == ("my-bucket", "a/b")
    assert open_place("socket", tmp_path, timeout_s=1, say=Said()) is None


# The layer in front of the emulator.


def test_the_gate_adds_the_preconditions_that_the_emulator_ignores(
    cloud: tuple[Emulator, Gate], gate: Gate
) -> None:
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud import storage

    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{cloud[0].port}"
    bare = storage.Client().bucket(BUCKET).blob("gate/bare")
    os.environ["STORAGE_EMULATOR_HOST"] = gate.address
    guarded = storage.Client().bucket(BUCKET).blob("gate/guarded")
    for blob in (bare, guarded):
        blob.upload_from_string(b"first", if_generation_match=0)
    bare.upload_from_string(b"second", if_generation_match=0)
    assert bare.download_as_bytes() == b"second"  # why the gate is needed
    for data in (b"second", b"s" * (9 * 2**20)):
        with pytest.raises(PreconditionFailed):
            guarded.upload_from_string(data, if_generation_match=0)
    assert guarded.download_as_bytes() == b"first"
    guarded.upload_from_string(b"third")  # without a precondition it overwrites
    guarded.reload()
    generation = guarded.generation
    assert guarded.download_as_bytes(if_generation_match=generation) == b"third"
    with pytest.raises(PreconditionFailed):
        guarded.download_as_bytes(if_generation_match=generation - 1)


def test_the_emulators_data_survive_a_kill(
    cloud: tuple[Emulator, Gate], gate: Gate, tmp_path: Path
) -> None:
    emulator, _ = cloud
    place = bucket(tmp_path)
    place.create("r/x.pt", DATA, {"a": "b"})
    emulator.kill()
    with pytest.raises(RunError, match="did not answer"):
        bucket(tmp_path, timeout_s=1).read("r/x.pt")
    emulator.start()
    assert place.read("r/x.pt") == (DATA, {"a": "b"})
