"""Every attack that we know, over real sockets: what the server answers, and who is disturbed."""

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("websockets")

import sfl.archive
from experiments.fuzz import cases, workers
from experiments.hostile import __main__ as hostile
from experiments.hostile.files import RunsCode, hostile_files, saved
from experiments.hostile.insiders import Insider, insiders, try_insider, write_bystander
from experiments.hostile.strangers import SLOW_ATTACKS, quick_attacks
from experiments.hostile.target import Target, target_of
from experiments.hostile.upgrades import FRAMES, SLOW_UPGRADES, try_frames
from sfl.archive.checkpoint import checkpoint_paths, path_of, round_of
from sfl.archive.layout import MANIFEST
from sfl.archive.manifest import manifest_line, read_manifest
from sfl.auth import main as auth_main
from sfl.config import RunConfig
from sfl.errors import ConfigError, IntegrityError, PeerFailed
from sfl.files.checksum import checksum
from sfl.nodes import NodeConfig
from sfl.options import names_of
from sfl.runtime.recorded_run import load
from sfl.runtime.resume import open_past
from sfl.runtime.simulation import simulate
from sfl.transport.tokens import read_tokens
from sfl.weights.exchange import WeightKey, client_weights
from sfl.weights.object_store import Directory
from sfl.weights.stored_weights import describe, object_path
from sfl.wire.messages import MessageType
from tests.support.attacked import OVER_HOP, PLACES
from tests.support.certificates import Certificates
from tests.support.handshakes import token_file
from tests.support.launch import Launcher, Program, free_port, options_of, started, wait_for

pytestmark = pytest.mark.slow  # each starts a server

FAST = ["--model", "mlp", "--batch-size", 200]
EVIL = saved(RunsCode())
JSON = "INVALID_MESSAGE: a message's JSON cannot be read: "
NAME = "is not up to 128 letters"
# What a server with tokens answers to whoever reaches its port.
ANSWERS = {
    "HTTP": "(from the server|INVALID_MESSAGE): the peer does not speak the SFL protocol",
    "random bytes": "INVALID_MESSAGE: the peer does not speak the SFL protocol",
    "SFL 0.1": "from the server: it runs SFL 0.1 .protocol 1",
    "a flipped bit in the magic": "TRY_AGAIN: the head of a message arrived damaged",
    "a flipped bit in the version": "TRY_AGAIN: the head of a message arrived damaged",
    "a flipped bit in a length": "TRY_AGAIN: the head of a message arrived damaged",
    "a flipped bit in the JSON": "TRY_AGAIN: a message's JSON arrived damaged",
    "another version": "INVALID_MESSAGE: this is SFL .*, and you run another release",
    "unknown flags": "INVALID_MESSAGE: a frame sets flags",
    "JSON of 2 GiB": "INVALID_MESSAGE: a message announces 2147483648 bytes of JSON; at most 4068",
    "a length of 2^63": "INVALID_MESSAGE: .* payload of 9223372036854775808 bytes; at most 0 ",
    "a payload of 4 GiB": "INVALID_MESSAGE: .* payload of 4294967296 bytes; at most 0 ",
    "JSON 10,000 deep": "INVALID_MESSAGE: a message announces 10000 bytes of JSON; at most 4068",
    "JSON 2,000 deep": JSON + "it is nested more than 16 deep",
    "an integer of 10,000 digits": "INVALID_MESSAGE: a message announces 10006 bytes of JSON",
    "an integer of 3,000 digits": JSON + "it has an integer of 3000 digits",
    "1e999": JSON + "it has a number 1e999 that no float holds",
    "NaN as a round": "INVALID_MESSAGE: a message's 'round' is not of type int",
    "a field twice": JSON + "it names a field twice",
    "invalid UTF-8": JSON + "'utf-8' codec can't decode byte 0xff",
    "a NUL byte": f"INVALID_MESSAGE: a message's 'run' {NAME}",
    "../ in a name": f"INVALID_MESSAGE: a message's 'run' {NAME}",
    "an absolute name": f"INVALID_MESSAGE: a message's 'sender' {NAME}",
    "a line break in a name": f"INVALID_MESSAGE: a message's 'sender' {NAME}",
    "a message out of turn": "INVALID_MESSAGE: the peer sent TRAINING_DONE, expected was AUTH",
    "a heartbeat first": "INVALID_MESSAGE: the peer sent HEARTBEAT, expected was AUTHENTICATE",
    "evil labels": r"INVALID_MESSAGE: .* payload of \d+ bytes; at most 0 are accepted here",
    "evil activations": r"INVALID_MESSAGE: .* payload of \d+ bytes; at most 0 are accepted here",
    "an evil model": r"INVALID_MESSAGE: .* payload of \d+ bytes; at most 0 are accepted here",
    "a REGISTER that lacks all": "INVALID_MESSAGE: this server asks for a token",
    "no token": "INVALID_MESSAGE: this server asks for a token",
    "a wrong token": "INVALID_MESSAGE: the token is not the one of this server",
    "a proof of no text": "INVALID_MESSAGE: PROOF lacks 'proof', of type str",
    "the main server's role": "INVALID_MESSAGE: the token is not the one of this server",
    "a replayed handshake": "INVALID_MESSAGE: the token is not the one of this server",
    "another client's id": "INVALID_MESSAGE: registers as client_0, but has proved to be client_3",
    "a proof of half a character": JSON + "'utf-8' codec can't encode",
    "quotes and brackets": JSON + "it is nested more than 16 deep",
    "plain text to a TLS port": "INVALID_MESSAGE: this server speaks TLS alone",
    "TLS 1.0": "no TLS: .*(PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL|NO_PROTOCOLS)",
    "half-open connections": "INVALID_MESSAGE: .*REGISTER, expected was PROOF",
    "an upgrade to WebSocket 8": "HTTP/1.1 4(00|26) ",
    "an upgrade, junk and a close at once": "closed the connection",
    "an upgrade, a message and a close at once": "closed the connection",
    "half an upgrade and a close at once": "HTTP/1.1 400 |closed",
    "an upgrade without a key": "HTTP/1.1 400 ",
    "an upgrade with a key of one byte": "HTTP/1.1 400 ",
    "an upgrade by HTTP/1.0": "HTTP/1.1 505 |closed",
    "an upgrade by HTTP/3.0": "closed the connection",
    "an upgrade by POST": "INVALID_MESSAGE: the peer does not speak the SFL protocol",
    "an upgrade by GETS": "HTTP/1.1 405 |closed",
    "a browser's Origin": "HTTP/1.1 403 ",
    "an upgrade with a body": "closed the connection",
    "an upgrade in chunks": "closed the connection",
    "a header of 1 MB": "HTTP/1.1 431 |closed",
    "10,000 headers": "HTTP/1.1 431 |closed",
    "a header of no name": "closed the connection",
    "a line that does not end": "HTTP/1.1 414 |closed",
    "an offer to compress": "INVALID_MESSAGE: this server asks for a token",
    "a WebSocket's frame of 2^63 bytes": "closed: 1009 .*9223372036854775808 bytes exceeds limit",
    "a WebSocket's frame of 1 GB": "closed: 1009 .*1000000000 bytes exceeds limit of 1048576",
    "fragments for ever": "closed the connection|INVALID_MESSAGE: |TRY_AGAIN: the head",
    "empty fragments for ever": "closed the connection|INVALID_MESSAGE: .*pings or empty messages",
    "a compressed message": "closed: 1002 reserved bits must be 0",
    "a frame without a mask": "closed: 1002 incorrect masking",
    "an unknown opcode": "closed: 1002 invalid opcode",
    "a long ping": "closed: 1002 control frame too long",
    "pings for ever": "closed the connection|INVALID_MESSAGE: .*pings or empty messages",
    "pongs for ever": "closed the connection|INVALID_MESSAGE: .*pings or empty messages",
    "empty messages for ever": "closed the connection|INVALID_MESSAGE: .*pings or empty messages",
    "closes for ever": "closed",
    "a close of no code": "closed: 1002 close frame too short",
    "text": "INVALID_MESSAGE: a WebSocket's text; SFL sends binary messages",
    "a continuation of nothing": "closed: 1002 unexpected continuation frame",
}


@pytest.fixture(scope="module", params=PLACES)
def attacked(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Target]:
    """What waits for a client, or has one, and is none the worse in the end."""
    with started(tmp_path_factory.mktemp("attacked")) as launcher:
        own = token_file(launcher.folder, f"3 {'a' * 40}", name="own")
        every = token_file(launcher.folder, f"0 {'t' * 40}", f"3 {'a' * 40}", name="tokens")
        with PLACES[request.param](launcher, every, Certificates(launcher.folder)) as port:
            yield Target("127.0.0.1", port, tls=True, tokens=read_tokens(own))
        assert not list(launcher.folder.rglob("*evil*"))


def test_every_attack_has_its_answer() -> None:
    assert ANSWERS.keys() == quick_attacks().keys()


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("over", ["tcp", "ws"])
def test_whoever_reaches_the_port_is_answered_and_closed(
    attacked: Target, name: str, over: str
) -> None:
    target = dataclasses.replace(attacked, websocket=over == "ws")
    assert re.match(ANSWERS[name], quick_attacks()[name](target))


@pytest.fixture(scope="module", params=["server", "hop"])
def open_to_insiders(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Target]:
    with started(tmp_path_factory.mktemp("insider")) as launcher:
        own = ["--partition", "own", "--batch-size", 4, "--clients", 2, "--run", "r", "--rounds", 1]
        over_hop, port = options_of(OVER_HOP) if request.param == "hop" else [], launcher.port
        parties = [launcher.server("--model", "mlp", *own, *over_hop, "--transport", "ws")]
        if over_hop:
            port = free_port()
            parties.append(launcher.hop(1, port, launcher.port, "--transport", "ws"))
        for party in parties:
            wait_for(party, "listening")
        data = write_bystander(launcher.folder / "bystander")
        at = ["--server", f"127.0.0.1:{port}"]
        launcher.client(*at, "--client-id", 1, "--data-dir", data)
        yield Target("127.0.0.1", port)
        for party in parties:
            assert party.process.is_alive(), party.err
            assert "Traceback" not in party.out + party.err


@pytest.mark.parametrize("name", insiders())
def test_a_client_that_means_harm_is_refused(open_to_insiders: Target, name: str) -> None:
    target = dataclasses.replace(open_to_insiders, websocket=len(name) % 2 == 0)
    answer = try_insider(target, insiders()[name])
    # What was damaged on the way may be sent again; whatever else it is, is its own fault.
    passing = name == "a file damaged on the way"
    assert answer.startswith("TRY_AGAIN: " if passing else "INVALID_MESSAGE: ")
    kind, _, what = name.partition(": ")
    title = {"labels": "the labels", "activations": "the activations", "model": "the weights"}
    if kind in title and "bomb" not in what:
        assert f"{title[kind]} of client 0" in answer
    if kind == "activations" and what in hostile_files():
        _, reason = hostile_files()[what]
        assert re.search(f"{reason}|at most|expected", answer)


@pytest.mark.parametrize("name", FRAMES)
def test_a_client_that_sends_odd_frames_loses_its_connection(
    open_to_insiders: Target, name: str
) -> None:
    """All but text could be damage on the way, or endless: the client may come again."""
    answer = try_frames(open_to_insiders, name)
    endless = "for ever" in name
    wanted = ANSWERS[name] + "|TRY_AGAIN: .* arrived damaged" * endless
    assert re.match(wanted, answer)


# Files that somebody gave us


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A recorded run, as its maker sends it."""
    run = RunConfig(model="mlp", batch_size=400, rounds=1, clients=1, run="r")
    return simulate(run, NodeConfig(out=str(tmp_path)))


def replace(folder: Path, path: str, data: bytes) -> None:
    """Replace a file by another, and say in the manifests that it is the right one."""
    (folder / path).write_bytes(data)
    inside = (folder / path).parent
    _relist(inside if (inside / MANIFEST).exists() else folder, folder / path)
    if (inside / MANIFEST).exists():
        _relist(folder, inside / MANIFEST)


def _relist(manifest: Path, file: Path) -> None:
    now = {"bytes": file.stat().st_size, "checksum": checksum(file.read_bytes())}
    entries = [
        dataclasses.replace(e, **now) if manifest / e.path == file else e
        for e in read_manifest(manifest)
    ]
    (manifest / MANIFEST).write_text("".join(manifest_line(e) + "\n" for e in entries))


def fields_of_run(folder: Path) -> dict[str, object]:
    record = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in record.items() if name in names_of(RunConfig)}


TENSOR = "client_files/client_0/round_000/split_layer_tensor_0_0.pt"


def test_an_archive_runs_nothing(given: Path) -> None:
    for data, _ in hostile_files().values():
        replace(given, TENSOR, data)
        (first, *_) = sfl.archive.open(given).steps()
        with pytest.raises(IntegrityError, match=r"split_layer_tensor_0_0\.pt: "):
            _ = first.activations


def test_replay_and_resume_run_nothing(given: Path, launcher: Launcher) -> None:
    replace(given, "models/client_model_000.pt", EVIL)
    with pytest.raises(IntegrityError, match=r"client_model_000.pt: asks for"):
        load(given).shared_at(1)
    checkpoint = given / path_of(1)
    fields = json.loads(checkpoint.read_text())
    fields["files"]["models/client_model_000.pt"] = [len(EVIL), checksum(EVIL)]
    fields.pop("check")
    fields["check"] = checksum(json.dumps(fields).encode())
    checkpoint.write_text(json.dumps(fields))
    server = launcher.server("--resume", given, "--rounds", 2)
    client = launcher.client("--reconnect-timeout", 0)
    assert "client_model_000.pt: asks for __builtin__ exec" in server.ended_with(1)
    client.ended_with(1)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"path": "../../evil"}, "a path outside the folder"),
        ({"path": "/etc/passwd"}, "a path outside the folder"),
        ({"path": "a\0b"}, "a path outside the folder"),
        ({"path": 3}, "of another type"),
        ({"bytes": "x"}, "of another type"),
        ({"bytes": -1}, "out of range"),
        ({"offset": -5}, "out of range"),
        ({"shape": ["x"]}, "of another type"),
        ({"round": 1.5}, "of another type"),
        ({"round": -2}, "out of range"),
        ({"client": 2**31}, "out of range"),
        ({"offset": 10**20}, "out of range"),
        ({"clients": [[]]}, "of another type"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_manifest_of_bad_will_is_refused(
    given: Path, changed: dict[str, object], why: str
) -> None:
    line = json.loads((given / MANIFEST).read_text().splitlines()[0])
    line.pop("check")
    line |= changed
    line["check"] = checksum(json.dumps(line).encode())
    with open(given / MANIFEST, "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(IntegrityError, match=f"is damaged: .*{why}"):
        sfl.archive.open(given)


@pytest.mark.parametrize(
    "changed",
    [
        {"round": "1"}, {"round": 10**9}, {"round": -5}, {"round": 2}, {"config": None},
        {"about": None}, {"about": {}}, {"about": {"data": 7}}, {"about": {"fingerprint": [1]}},
        {"files": []}, {"files": {"models/x.pt": [float("inf"), "x"]}},
        {"files": {"../x": [1, "x"]}}, {"files": {"models/x.pt": [-1, "x"]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_of_bad_will_is_refused(given: Path, changed: dict[str, object]) -> None:
    checkpoint = given / path_of(1)
    fields = json.loads(checkpoint.read_text()) | changed
    fields.pop("check")
    fields["check"] = checksum(json.dumps(fields).encode())
    for path in (given / "checkpoints").iterdir():
        path.unlink()
    checkpoint.write_text(json.dumps(fields))
    with pytest.raises(IntegrityError, match="nothing to go on from is whole: "):
        open_past(given, RunConfig(**fields_of_run(given)))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("config.json", {"rounds": 10**9}),
        ("config.json", {"clients": 10**9}),
        ("config.json", {"rounds": [1]}),
        ("environment.json", {"data": None}),
        ("environment.json", {"data": {"input_shape": [1, 20_000, 20_000]}}),
        ("environment.json", {"data": {"num_samples": {"7": 1}}}),
        ("environment.json", {"fingerprint": 3}),
    ],
    ids=str,
)
def test_a_record_of_bad_will_is_refused(
    given: Path, name: str, changed: dict[str, object]
) -> None:
    record = json.loads((given / name).read_text())
    for key, value in changed.items():
        whole = isinstance(value, dict) and isinstance(record[key], dict)
        record[key] = record[key] | value if whole else value
    replace(given, name, json.dumps(record).encode())
    with pytest.raises((IntegrityError, ConfigError)):
        load(given)


def test_a_record_says_no_more_threads_than_there_are(given: Path) -> None:
    record = json.loads((given / "environment.json").read_text())
    record["fingerprint"]["threads"] = "3000"
    replace(given, "environment.json", json.dumps(record).encode())
    threads = torch.get_num_threads()
    load(given)
    assert torch.get_num_threads() <= (os.cpu_count() or 1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("what", ["server_log.txt", "models", "checkpoints/round_001.json"])
def test_nothing_is_written_through_the_links_of_others(
    given: Path, launcher: Launcher, tmp_path: Path, what: str
) -> None:
    victim = tmp_path / "victim"
    (given / what).rename(victim)
    before = victim.stat().st_mtime_ns
    (given / what).symlink_to(victim)
    line = launcher.server("--resume", given, "--rounds", 2).ended_with(1)
    assert f"cannot go on in {given}: {given / what}: is a link, or no file" in line
    assert victim.stat().st_mtime_ns == before


def test_a_pipe_or_a_device_in_an_archive_is_no_file(given: Path) -> None:
    steps = list(sfl.archive.open(given).steps())
    (given / TENSOR).unlink()
    os.mkfifo(given / TENSOR)
    with pytest.raises(IntegrityError, match="is no regular file"):
        _ = steps[0].activations
    (given / TENSOR).unlink()
    (given / TENSOR).symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match="Too many levels of symbolic links"):
        _ = steps[0].activations


def test_a_run_of_others_imports_nothing_unasked(given: Path, launcher: Launcher) -> None:
    record = json.loads((given / "config.json").read_text())
    record |= {"model": "tests.imported_by_others:model", "allow_import": record["model"]}
    replace(given, "config.json", json.dumps(record | {"allow_import": record["model"]}).encode())
    with pytest.raises(ConfigError, match=r"--allow-import tests\.imported_by_others:model"):
        load(given)
    line = launcher.server("--resume", given, "--rounds", 2).ended_with(2)
    assert "give --allow-import tests.imported_by_others:model" in line


@pytest.mark.parametrize(
    "what", ["a pickle that runs code", "a deflated file", "a view", "a pickle in front"]
)
def test_an_object_of_bad_will_is_refused(launcher: Launcher, tmp_path: Path, what: str) -> None:
    """With the right name, metadata and checksum, where the weights of a client should be."""
    (tmp_path / "place").mkdir()
    own = ["--partition", "own", "--batch-size", 4, "--rounds", 1, "--run", "r"]
    weights = ["--weights", f"dir:{tmp_path / 'place'}"]
    server = launcher.server("--clients", 1, "--model", "mlp", *own, *weights)
    wait_for(server, "listening")
    with Target("127.0.0.1", launcher.port).reach() as stream:
        insider = Insider(stream)
        link, data = insider.link, hostile_files()[what][0]
        link.receive_message_as_json(MessageType.GO_ON)
        link.receive_message_as_json(MessageType.WEIGHTS_STORED)
        link.receive_message_as_json(MessageType.START_TRAINING)
        insider.train()
        key = WeightKey(client_weights(0), insider.at())
        Directory(str(tmp_path / "place")).create(object_path(key), data, describe(key, data, 8))
        stored = {"name": key.name, "checksum": checksum(data)}
        link.send_message_as_json(MessageType.WEIGHTS_STORED, content=stored, at=key.at)
        why = f"the weights of client 0: .*({hostile_files()[what][1]})"
        with pytest.raises(PeerFailed, match=why):
            link.receive_message_as_json(MessageType.START_VALIDATION)


# Many at once, and mutations


@pytest.mark.slow
def test_a_short_fuzz_finds_only_our_own_errors() -> None:
    counts = {"frames": 10_000, "flips": 5000, "files": 2000, "texts": 1000, "handshakes": 2000}
    reports = workers.fuzz(counts, seed=1, workers=2)
    for kind, report in reports.items():
        assert report.failures == [], kind
        assert report.grown_bytes < 64 * 2**20
        assert sum(report.outcomes.values()) == counts[kind]


def test_the_fuzzer_tells_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> str:
        raise ValueError("not ours")

    monkeypatch.setitem(cases.CASES, "frames", (cases.frames, broken))
    report = workers.run("frames", 0, 0, 3)
    assert [f.partition(":")[0] for f in report.failures] == ["frames 0", "frames 1", "frames 2"]


def _held(program: Program) -> tuple[int, int, int]:
    folder = Path("/proc") / str(program.process.pid)
    status = (folder / "status").read_text()
    found = [re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "Threads")]
    return *(int(match[1]) for match in found if match), len(os.listdir(folder / "fd"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_crowd_gets_no_threads_and_little_memory(launcher: Launcher) -> None:

    server = launcher.server(*FAST, "--clients", 1, "--max-pending", 100)
    wait_for(server, "listening")
    before = _held(server)
    address = "127.0.0.1", launcher.port
    with contextlib.ExitStack() as crowd:
        for _ in range(400):
            crowd.enter_context(socket.create_connection(address))
        launcher.client("--client-id", 7).ended_with(1)  # so that all have been seen
        now = _held(server)
    assert now[0] - before[0] < 100 * 64  # kB: 64 for each that waits
    assert now[1] <= before[1] + 2  # the run's status, and the client's farewell
    assert now[2] <= before[2] + 101


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["wss"], indirect=True)
def test_a_run_that_is_attacked_in_every_way_ends_with_the_same_weights(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": "mlp", "batch_size": 100, "rounds": 400, "clients": 3, "run": "r"}
    options |= {"keep_tensors": "none"}
    auth_main(["new-token", str(tmp_path / "tokens"), "--clients", "4"])
    words = [w for n, v in options.items() for w in (f"--{n.replace('_', '-')}", v)]
    server = launcher.server(*words, "--token-file", tmp_path / "tokens")
    clients = [launcher.client("--token-file", tmp_path / f"tokens.{k}") for k in range(3)]
    wait_for(server, "round 2/")
    folder = launcher.folder / "server/r"
    argv = ["--server", f"wss://127.0.0.1:{launcher.port}", "--seconds", 1, "--folder", folder]
    argv += ["--token-file", tmp_path / "tokens.3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hostile", *map(str, argv)])
        code = hostile.main()
    table = capsys.readouterr().out
    assert code == 0, table
    answers = {line[:50].rstrip(): line[68:] for line in table.splitlines()}
    assert answers.keys() >= quick_attacks().keys() | SLOW_ATTACKS.keys()
    assert answers["1,000 idle connections"].endswith("closed all")
    for name in ("half a frame, and silence", "a byte every 5 seconds", *SLOW_UPGRADES):
        assert answers[name].startswith(("closed the connection", "TRY_AGAIN: register")), name
    # A checkpoint's files are on disk before it is.
    while not any(round_of(path) >= 40 for path in checkpoint_paths(folder)):
        server.process.join(0.02)
        assert server.process.is_alive(), server.err
    server.process.kill()
    assert all(client.process.is_alive() for client in clients)  # they wait for it
    alone = simulate(RunConfig(**options | {"rounds": 40}), NodeConfig(out=str(tmp_path / "alone")))
    for name in ("client_model_039.pt", "server_model_039.pt"):
        ours, theirs = (torch.load(run / "models" / name) for run in (alone, folder))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_only_this_machine_is_attacked() -> None:
    with pytest.raises(ConfigError, match="is not on this machine"):
        target_of("192.0.2.1:8765")
