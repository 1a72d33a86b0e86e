"""The bucket, and what goes wrong with it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sfl.errors import ConfigError, RunError
from sfl.weights.bucket import Bucket, parse_address
from sfl.weights.stores import check_address, open_place
from tests.support.emulator import BUCKET, DROP, STALL, Emulator, Fault, Gate, Request
from tests.support.places import DATA, PREFIX, Said, bucket
from tests.support.programs import ROOT


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_without_a_bucket_does_not_import_the_library() -> None:
    code = (
        "import sys, sfl.runtime.server, sfl.runtime.fed_server, sfl.runtime.client;"
        "import sfl.runtime.simulation;"
        "print([m for m in sys.modules if m.startswith('google.cloud.storage')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
