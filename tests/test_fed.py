"""Weights through every store, and the fed server apart: the same weights, and nobody sees more."""

import csv
import functools
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.crash import VARIABLE
from sfl.errors import RunError
from sfl.nodes import NodeConfig
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from sfl.runtime.simulation import simulate
from sfl.weights.object_store import Directory
from sfl.wire.messages import MessageType
from tests.support.emulator import BUCKET, Emulator, Gate
from tests.support.launch import (
    Launcher,
    Program,
    finish,
    free_port,
    options_of,
    send_signal,
    wait_for,
    was_killed,
)
from tests.support.proxy import UP, Proxy
from tests.support.runs import ALLOW, BN_DROPOUT, RUN, start_all
from tests.support.simulations import reference as recovery_reference
from tests.support.weights import assert_equal, weights

OPTIONS = ["--model", BN_DROPOUT, "--cut", 6, "--batch-size", 100, "--rounds", 2]


@pytest.fixture
def gate(cloud: tuple[Emulator, Gate], launcher: Launcher) -> Iterator[Gate]:
    gate = cloud[1]
    launcher.env["STORAGE_EMULATOR_HOST"] = gate.address
    gate.log.clear()
    yield gate
    gate.faults = lambda request: None


def address(kind: str, folder: Path) -> str:
    """Return a store of this test's own."""
    return {
        "socket": "socket",
        "dir": f"dir:{folder / 'shared'}",
        "gs": f"gs://{BUCKET}/{folder.name}",
    }[kind]


def address_of(server: Program) -> str:
    """Wait until a server listens, and return where."""
    wait_for(server, "listening on ")
    return re.search(r"listening on (\S+)", server.out)[1]


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every model file, wherever it lies."""
    runs = [folder / "server/r", folder / "fed/r", *folder.glob("client/r/client_*")]
    found: dict[str, torch.Tensor] = {}
    for run in runs:
        prefix = "own/" if "client" in run.parts[-3:] else ""
        ours = {f"{prefix}{name}": tensor for name, tensor in weights(run).items()}
        assert not ours.keys() & found.keys()
        found |= ours
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """Return every weight of a scheme's run in one process, through the socket store."""

    @functools.cache
    def run(scheme: str, cut: int | str = 6) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp("reference")
        config = RunConfig(
            scheme=scheme, model=BN_DROPOUT, cut=cut, batch_size=100, rounds=2, run="r"
        )
        simulate(config, NodeConfig(out=str(out)))
        return all_weights(out)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "kind", "apart", "cut"),
    [
        ("sflv1", "dir", False, 6), ("sflv1", "gs", False, 6), ("sl", "dir", False, 6),
        ("sl", "gs", False, 6), ("sflv1", "socket", True, 6), ("sflv1", "dir", True, 6),
        ("sflv1", "gs", True, 6), ("sl", "socket", True, 6), ("sl", "gs", True, 6),
        ("sflv2", "socket", True, 6), ("sflv3", "socket", True, 6), ("sflv3", "gs", True, 6),
        ("fl", "gs", True, 6), ("sync-sgd", "gs", False, 6),
        ("sflv1", "socket", True, "3,9"), ("sl", "gs", False, "3,9"),
    ],
)  # fmt: skip
def test_every_store_and_role_gives_the_same_weights(
    launcher: Launcher,
    gate: Gate,
    reference: Callable[..., dict[str, torch.Tensor]],
    scheme: str,
    kind: str,
    apart: bool,
    cut: int | str,
) -> None:
    place = address(kind, launcher.folder)
    options = ["--scheme", scheme, *OPTIONS, "--cut", cut]
    servers, clients = start_all(launcher, place, *options, apart=apart)
    finish([*servers, *clients])
    assert_equal(all_weights(launcher.folder), reference(scheme, cut))
    rows = csv.DictReader((launcher.folder / "server/r/rounds.csv").read_text().splitlines())
    assert [*rows][-1]["test_acc"] != ""  # in every role
    for run in (launcher.folder / "server/r", launcher.folder / "fed/r"):
        nothing = [("sflv3", "fed"), ("fl", "server")] if apart else []  # there is to compute
        if run.exists() and (scheme, run.parent.name) not in nothing:
            report = replay.check(load(run))
            assert report.findings == []
            assert report.models + report.checked > 0
    if apart:
        assert not list((launcher.folder / "server/r/models").glob("client_*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dir", "gs"])
def test_simulation_goes_through_a_store_as_well(
    tmp_path: Path,
    gate: Gate,
    reference: Callable[[str], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gate.address)
    options = {"model": BN_DROPOUT, "cut": 6, "batch_size": 100, "rounds": 2, "run": "r"}
    run = RunConfig(**options, weights=address(kind, tmp_path))
    simulate(run, NodeConfig(out=str(tmp_path / "out")))
    assert_equal(all_weights(tmp_path / "out"), reference("sflv1"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["socket", "gs"])
def test_no_byte_of_a_front_reaches_the_main_server(
    launcher: Launcher, gate: Gate, kind: str
) -> None:
    """Everything that the clients send it is recorded; so are its counters and its files."""
    place = address(kind, launcher.folder)
    store = [] if kind == "socket" else ["--weights", place]
    fed_port = free_port()
    if kind == "socket":
        fed = launcher.fed("--port", fed_port, *ALLOW)
        role = ["--role", "main", "--fed-server", f"127.0.0.1:{fed_port}"]
    else:
        fed, role = launcher.fed(*store, "--run", "r", *ALLOW), ["--role", "main"]
    server = launcher.server("--clients", 2, "--run", "r", *store, *role, *OPTIONS)
    wait_for(server, "listening")
    proxy = Proxy(launcher.port)
    real, launcher.port = launcher.port, proxy.port
    allow = [] if kind == "socket" else ["--allow-weights", place]
    clients = [launcher.client("--client-id", k, *ALLOW, *allow) for k in range(2)]
    launcher.port = real
    finish([fed, server, *clients])
    proxy.close()
    fronts = [
        tensor.numpy().tobytes()
        for path in (launcher.folder / "fed/r/models").glob("client_*.pt")
        for name, tensor in torch.load(path, weights_only=True).items()
        if tensor.numel() * tensor.itemsize >= 256
    ]
    assert len(fronts) >= 7  # the convolution's weights: initial, and two clients and their average
    carries = {
        MessageType.SEND_MODEL,
        MessageType.SEND_AGGREGATED_MODEL,
        MessageType.WEIGHTS_STORED,
    }
    carries |= {MessageType.REQUEST_TO_SEND_FILE, MessageType.SEND_FILE}
    sent = received = 0
    for recorded in proxy.connections:
        assert not {message.type for _, message in recorded.messages} & carries
        received += len(recorded.streams[UP])
        for way, stream in recorded.streams.items():
            assert not any(front[:128] in stream for front in fronts), way
        sent += 1
    assert sent == 2
    rows = [
        line.split(",") for line in (launcher.folder / "server/r/rounds.csv").read_text().split()
    ]
    counted = sum(int(row[rows[0].index("bytes_up")]) for row in rows[1:])
    assert 0 < counted <= received
    files = [path for path in (launcher.folder / "server/r").rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes()
        assert not any(front[:128] in content for front in fronts), path


def outage(emulator: Emulator, gate: Gate, seconds: float) -> threading.Thread:
    """Stop the bucket for a while, from now on, and start it again with its data."""
    gate.stop()
    emulator.kill()

    def back() -> None:
        time.sleep(seconds)
        emulator.start()
        gate.start()

    thread = threading.Thread(target=back)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
def test_a_bucket_that_is_away_for_a_while_is_waited_for(
    launcher: Launcher, cloud: tuple[Emulator, Gate], gate: Gate, apart: bool, tmp_path: Path
) -> None:
    place = address("gs", launcher.folder)
    more = [*OPTIONS, "--rounds", 4, "--local-epochs", 2]
    servers, clients = start_all(launcher, place, *more, apart=apart)
    wait_for(servers[0], "round 1/4")
    thread = outage(cloud[0], gate, 4.0)
    finish([*servers, *clients])
    thread.join()
    programs = [*servers[:1], *clients]
    said = [program.out.count("does not answer") for program in programs]
    assert sum(said) >= 1
    assert max(said) <= 2  # each says it once for each time that it meets it
    options = {"model": BN_DROPOUT, "cut": 6, "batch_size": 100, "rounds": 4, "local_epochs": 2}
    simulate(RunConfig(**options, run="r"), NodeConfig(out=str(tmp_path / "simulated")))
    assert_equal(all_weights(launcher.folder), all_weights(tmp_path / "simulated"))


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_who_is_impatient_and_the_run_goes_on(
    launcher: Launcher, gate: Gate, tmp_path: Path
) -> None:
    """The server waits for its clients; it is stopped in between, too."""
    place = address("gs", launcher.folder)
    more = [*OPTIONS, "--rounds", 50]
    server = launcher.server("--clients", 2, "--run", "r", "--weights", place, *more)
    options = [*ALLOW, "--allow-weights", place]
    impatient = [*options, "--weights-timeout", 1.5]
    clients = [launcher.client("--client-id", k, *impatient) for k in range(2)]
    wait_for(server, "round 2/50")
    gate.stop()
    try:
        lines = [program.ended_with(1) for program in clients]
    finally:
        gate.start()
    assert all("did not answer for 1.5 seconds" in line for line in lines)
    wait_for(server, "client_1 is away")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    done = server.out.count("training loss")
    run = launcher.folder / "server/r"
    server = launcher.server("--resume", run, "--rounds", done + 2)
    clients = [launcher.client("--client-id", k, *options) for k in range(2)]
    finish([server, *clients])
    options = {"model": BN_DROPOUT, "cut": 6, "batch_size": 100, "rounds": done + 2, "clients": 2}
    simulate(RunConfig(**options, run="r"), NodeConfig(out=str(tmp_path / "simulated")))
    assert_equal(all_weights(launcher.folder), all_weights(tmp_path / "simulated"))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["checkpoint.before_rename:3", "checkpoint.after_rename:3"])
def test_a_fed_server_that_dies_anywhere_goes_on_with_the_others(
    launcher: Launcher, tmp_path: Path, point: str
) -> None:
    """With two servers the run ends for all; started again, all agree on a round."""
    port, run = free_port(), RUN | {"rounds": 4}
    role = ["--role", "main", "--fed-server", f"127.0.0.1:{port}"]
    fed = launcher.fed("--port", port, *ALLOW, env={VARIABLE: point})
    server = launcher.server(*options_of(run), *role)
    clients = [launcher.client("--client-id", k, *ALLOW) for k in range(3)]
    was_killed(fed)
    for program in (server, *clients):
        program.ended_with(1)
    finish(
        [
            launcher.fed("--port", port, *ALLOW),
            launcher.server("--resume", launcher.folder / "server/r"),
            *(launcher.client("--client-id", k, *ALLOW) for k in range(3)),
        ]
    )
    whole = recovery_reference(tmp_path / "simulated", run)
    assert_equal(all_weights(launcher.folder), all_weights(whole.parent.parent))


@pytest.mark.slow
def test_separate_servers_go_on_as_well(
    launcher: Launcher, gate: Gate, reference: Callable
) -> None:
    fed_port = free_port()
    role = ["--role", "main", "--fed-server", f"127.0.0.1:{fed_port}"]
    one_round = [*OPTIONS[:-2], "--rounds", 1]
    programs = [
        launcher.fed("--port", fed_port, *ALLOW),
        launcher.server("--clients", 3, "--run", "r", *role, *one_round),
        *(launcher.client("--client-id", k, *ALLOW) for k in range(3)),
    ]
    finish(programs)
    programs = [
        launcher.fed("--port", fed_port, *ALLOW),
        launcher.server("--resume", launcher.folder / "server/r", "--rounds", 2),
        *(launcher.client("--client-id", k, *ALLOW) for k in range(3)),
    ]
    finish(programs)
    assert_equal(all_weights(launcher.folder), reference("sflv1"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dir", "gs"])
def test_separate_servers_go_on_through_a_store(
    launcher: Launcher, gate: Gate, reference: Callable[[str], dict[str, torch.Tensor]], kind: str
) -> None:
    place = address(kind, launcher.folder)
    store, allow = ["--weights", place], ["--allow-weights", place]
    fed = ["--run", "r", *store, *ALLOW]
    main = ["--clients", 3, "--run", "r", "--role", "main", *store, *OPTIONS[:-2], "--rounds", 1]
    more = [["--resume", launcher.folder / "fed/r"], ["--resume", launcher.folder / "server/r"]]
    for number in range(2):
        resume_fed = more[0] if number else []
        resume_main = [*more[1], "--rounds", 2] if number else main
        finish([
            launcher.fed(*fed, *resume_fed),
            launcher.server(*resume_main),
            *(launcher.client("--client-id", k, *ALLOW, *allow) for k in range(3)),
        ])  # fmt: skip
    assert_equal(all_weights(launcher.folder), reference("sflv1"))


@pytest.mark.slow
def test_a_fed_server_that_was_killed_takes_its_run_up_again(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The main server and the clients only wait for the average that is missing."""
    place = f"dir:{launcher.folder / 'shared'}"
    fed_options = ["--run", "r", "--weights", place, *ALLOW]
    servers, clients = start_all(launcher, place, *OPTIONS[:-2], "--rounds", 6, apart=True)
    wait_for(servers[0], "round 2/6")
    servers[0].process.kill()
    servers[0].process.join()
    fed = launcher.fed(*fed_options, "--resume", launcher.folder / "fed/r")
    finish([fed, servers[1], *clients])
    options = {"model": BN_DROPOUT, "cut": 6, "batch_size": 100, "rounds": 6, "run": "r"}
    simulate(RunConfig(**options), NodeConfig(out=str(tmp_path / "simulated")))
    assert_equal(all_weights(launcher.folder), all_weights(tmp_path / "simulated"))


@pytest.mark.slow
def test_a_fed_server_waits_as_long_as_its_peers_are_there(launcher: Launcher) -> None:
    """In sflv3 it hears nothing through the whole run; its --peer-timeout is no limit to that."""
    fed_port = free_port()
    fed = launcher.fed("--port", fed_port, *ALLOW, "--peer-timeout", 0.5)
    role = ["--role", "main", "--fed-server", f"127.0.0.1:{fed_port}", "--scheme", "sflv3"]
    options = [*OPTIONS[:-2], "--rounds", 25, "--keep-tensors", "none"]
    server = launcher.server("--clients", 1, "--run", "r", *role, *options)
    finish([launcher.client(*ALLOW), server, fed])


def test_a_fed_server_imports_nothing_that_it_does_not_allow(launcher: Launcher) -> None:
    fed_port = free_port()
    fed = launcher.fed("--port", fed_port)
    role = ["--role", "main", "--fed-server", f"127.0.0.1:{fed_port}"]
    server = launcher.server("--clients", 1, "--run", "r", *role, *OPTIONS)
    client = launcher.client(*ALLOW, "--connect-timeout", 5)
    assert "if you trust that module, give --allow-import" in fed.ended_with(2)
    server.ended_with(1)
    client.ended_with(1)


def test_a_client_that_wants_the_servers_apart_insists(launcher: Launcher) -> None:
    for own, wanted in (
        (["--fed-server", "127.0.0.1:1"], "but the server is that as well"),
        (["--allow-weights", "gs://mine"], "but the server has the weights sent to it"),
    ):
        server = launcher.server("--clients", 1, *OPTIONS, "--port", 0)
        client = launcher.client("--server", address_of(server), *ALLOW, *own)
        assert wanted in client.ended_with(2)
        wait_for(server, f"{wanted}; its place is free")


# What ends before the training, with one line.


@pytest.mark.parametrize(
    ("options", "code", "wanted"),
    [
        (["--weights", "gs://No-Bucket/x"], 2, "is no name of a bucket"),
        (["--weights", "gs://no-such-bucket/x"], 1, "there is no bucket 'no-such-bucket'"),
        (["--weights", "dir:/dev/null/x"], 1, "cannot use dir:/dev/null/x: Not a directory"),
        (["--role", "main"], 2, "give --fed-server HOST:PORT, or let the weights"),
        (["--role", "main", "--weights", "dir:x", "--fed-server", "h:1"], 2, "give --fed-server"),
        (["--fed-server", "h:1"], 2, "--fed-server h:1: is for --role main"),
        (
            ["--role", "main", "--scheme", "sync-sgd", "--weights", "dir:x"], 2,
            "in --scheme sync-sgd the server updates all weights",
        ),
        (["--role", "fed", "--weights", "dir:x"], 2, "say with --run which run"),
        (["--weights-timeout", 0], 2, "--weights-timeout 0.0: must be"),
    ],
)  # fmt: skip
def test_servers_that_cannot_start_say_why(
    launcher: Launcher, gate: Gate, options: list[object], code: int, wanted: str
) -> None:
    assert wanted in launcher.server(*options).ended_with(code)


def test_no_permission_ends_before_the_training(launcher: Launcher, gate: Gate) -> None:
    place = address("gs", launcher.folder)
    gate.faults = lambda request: (403, "forbidden") if request.uploads else None
    servers, clients = start_all(launcher, place, *OPTIONS, clients=1)
    assert "no permission to write r/clients/client_0" in clients[0].ended_with(1)
    wait_for(servers[0], "client_0 is away: client_0 stopped: no permission to write")


@pytest.mark.slow
def test_a_client_gives_its_weights_to_no_place_that_it_does_not_allow(
    launcher: Launcher, gate: Gate
) -> None:
    place = address("gs", launcher.folder)
    for allow in ([], ["--allow-weights", "gs://another"], ["--allow-weights", f"{place}-x"]):
        server = launcher.server("--clients", 1, "--weights", place, *OPTIONS, "--port", 0)
        client = launcher.client("--server", address_of(server), *ALLOW, *allow)
        assert "which this client does not allow" in client.ended_with(2)
        wait_for(server, "its place is free")


def test_a_client_has_its_own_path_to_a_shared_folder(launcher: Launcher) -> None:
    """The same folder by another name, as machines mount it."""
    folder = launcher.folder / "shared"
    folder.mkdir()
    (launcher.folder / "mounted").symlink_to(folder)
    server = launcher.server("--clients", 1, "--run", "r", "--weights", f"dir:{folder}", *OPTIONS)
    client = launcher.client(*ALLOW, "--allow-weights", f"dir:{launcher.folder / 'mounted'}")
    finish([server, client])
    assert (folder / "r/round_001/client_0.pt").exists()


def test_a_second_run_of_a_name_is_told(launcher: Launcher) -> None:
    """Two servers of one run's name share a folder for weights."""
    place = f"dir:{launcher.folder / 'shared'}"
    options = ["--clients", 1, "--run", "r", "--weights", place, *OPTIONS]
    server = launcher.server(*options)
    client = launcher.client(*ALLOW, "--allow-weights", place)
    finish([server, client])
    shutil.rmtree(launcher.folder / "server")
    shutil.rmtree(launcher.folder / "client")
    server = launcher.server(*options, "--partition", "sizes:1", "--seed", 5)
    client = launcher.client(*ALLOW, "--allow-weights", place, "--reconnect-timeout", 0)
    for program in (server, client):
        assert "init.pt is there already with other content" in program.ended_with(1)


def test_of_two_clients_of_an_id_the_first_counts(
    launcher: Launcher, reference: Callable[[str], dict[str, torch.Tensor]]
) -> None:
    """Another process writes as client 0 as soon as client 0 has written; it is told, and alone."""
    place = address("dir", launcher.folder)
    servers, clients = start_all(launcher, place, *OPTIONS)
    path, store = "r/round_000/client_0.pt", Directory(place.removeprefix("dir:"))
    while store.read(path) is None:
        servers[0].process.join(0.01)
        assert servers[0].process.is_alive()
    with pytest.raises(RunError, match=r"client_0.pt is there already with other content"):
        store.create(path, b"weights of another process", {"run": "r"})
    finish([*servers, *clients])
    assert_equal(all_weights(launcher.folder), reference("sflv1"))


def test_a_fed_server_that_ends_is_named(launcher: Launcher) -> None:
    fed_port = free_port()
    fed = launcher.fed("--port", fed_port, *ALLOW)
    role = ["--role", "main", "--fed-server", f"127.0.0.1:{fed_port}"]
    server = launcher.server("--clients", 1, "--run", "r", *role, *OPTIONS[:-2], "--rounds", 500)
    client = launcher.client(*ALLOW)
    wait_for(server, "round 2/500")
    fed.process.kill()
    assert "the fed server closed the connection" in client.ended_with(1)
    assert "client_0 stopped: the fed server closed the connection" in server.ended_with(1)
