"""Whoever is killed, stopped or cut off comes back, and the run ends as if nothing had happened."""

import csv
import random
import re
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from experiments.support.same_run import compare
from experiments.support.slow_link import SlowLink
from sfl.archive.checkpoint import checkpoint_paths
from sfl.archive.round_log import read_summary
from sfl.config import RunConfig
from sfl.crash import POINTS, VARIABLE
from sfl.errors import ConfigError
from sfl.options import from_values
from sfl.runtime import replay
from sfl.runtime.local_network import Away
from sfl.runtime.recorded_run import load
from sfl.strategy.order import draw
from tests.support.launch import (
    Launcher,
    Program,
    in_turns,
    options_of,
    send_signal,
    wait_for,
    was_killed,
)
from tests.support.runs import ALLOW, OWN_STATE, RUN, STEPS
from tests.support.simulations import reference
from tests.support.weights import assert_same

References = Callable[[dict[str, object]], Path]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return what gives the undisturbed run of a configuration, made once."""

    @cache
    def of(items: tuple[tuple[str, object], ...]) -> Path:
        return reference(tmp_path_factory.mktemp("whole"), dict(items))

    return lambda run: of(tuple(sorted(run.items())))


def start(launcher: Launcher, run: dict[str, object], *options: object) -> list[Program]:
    """Start a server and its clients."""
    server = launcher.server(*options_of(run), *options)
    clients = range(int(str(run.get("clients", 3))))
    return [server, *(launcher.client("--client-id", k, *ALLOW) for k in clients)]


def resume(launcher: Launcher, *options: object) -> Program:
    return launcher.server("--resume", launcher.folder / "server/r", *options)


EACH_SCHEME = [
    {"scheme": "sl"},
    {"scheme": "sflv1", "optimizer_state": "keep"},
    {"scheme": "sflv2"},
    {"scheme": "sflv3", "optimizer_state": "keep", "participation": 0.6},
    {"scheme": "sflv2", "topology": "vertical", "partition": "vertical"},
    {"scheme": "fl", "aggregation": "fedadam:lr=0.01"},
    {"scheme": "sync-sgd", "optimizer_state": "keep"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "scheme"),
    in_turns(EACH_SCHEME),
    indirect=["launcher"],
    ids=lambda s: s if isinstance(s, str) else s.get("topology") or s["scheme"],
)
def test_a_run_whose_processes_are_killed_ends_as_if_they_had_not_been(
    launcher: Launcher, tmp_path: Path, scheme: dict[str, object], references: References
) -> None:
    """A client twice, once with its successor, then the server, and the server with a client."""
    run = RUN | scheme
    server = launcher.server(*options_of(run))
    in_step = {"fl": "trained.before_said:1"}.get(str(scheme["scheme"]), "")
    first = in_step or ("weights.before_put:1" if scheme["scheme"] == "sync-sgd" else "")
    first = first or "front.before_update:3"
    clients = [
        launcher.client("--client-id", k, *ALLOW, env={VARIABLE: first} if k == 1 else {})
        for k in range(3)
    ]
    was_killed(clients[1])
    wait_for(server, "client_1 is away: client_1 closed the connection")
    clients[1] = launcher.client("--client-id", 1, *ALLOW, env={VARIABLE: "validation.before:1"})
    was_killed(clients[1])
    clients[1] = launcher.client("--client-id", 1, *ALLOW)
    wait_for(server, "round 2/3")  # so that the first, with what was redone in it, is on disk
    send_signal(server, signal.SIGKILL)
    was_killed(server)
    server = launcher.server(
        "--resume", launcher.folder / "server/r", env={VARIABLE: "validation.after:1"}
    )
    was_killed(server)
    send_signal(clients[2], signal.SIGKILL)
    clients[2] = launcher.client("--client-id", 2, *ALLOW)
    server = resume(launcher)
    for program in (server, *clients):
        program.ended_with(0)
    assert_same(references(run), launcher.folder / "server/r")


# Where each end of a run gets to; how often before it dies, so that it is in the second round.
SERVER_POINTS = {
    "start.ready": 1, "file.before_rename": 40, "file.after_rename": 41, "manifest.after_lines": 40,
    "step.before_answer": 27, "step.after_answer": 28, "step.after_update": 29,
    "average.before": 2, "average.after": 2, "validation.after": 2, "round.told": 2,
    "rounds_csv.before": 2, "rounds_csv.after": 2, "checkpoint.before_rename": 3,
    "checkpoint.after_rename": 3, "checkpoint.after_removal": 3, "run.before_goodbye": 1,
    "run.after_goodbye": 1,
}  # fmt: skip
CLIENT_POINTS = {
    "start.registered": 1, "file.before_rename": 5, "file.after_rename": 5,
    "manifest.after_lines": 5, "front.before_update": 9, "front.after_update": 9,
    "trained.before_said": 2, "validation.before": 2, "checkpoint.before_rename": 2,
    "checkpoint.after_rename": 2, "checkpoint.after_removal": 2, "run.before_goodbye": 1,
}  # fmt: skip
WEIGHTS_POINTS = {"weights.before_put": 2, "weights.after_put": 2}  # of clients that send them
AVERAGED = RUN | {"clients": 2}


def test_every_crash_point_is_tried() -> None:
    assert set(POINTS) == SERVER_POINTS.keys() | CLIENT_POINTS.keys() | WEIGHTS_POINTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "point"), in_turns(SERVER_POINTS), indirect=["launcher"])
def test_a_server_that_dies_anywhere_goes_on(
    launcher: Launcher, point: str, references: References
) -> None:
    crash = {VARIABLE: f"{point}:{SERVER_POINTS[point]}"}
    server = launcher.server(*options_of(OWN_STATE), env=crash)
    clients = [launcher.client("--client-id", k, *ALLOW) for k in range(2)]
    was_killed(server)
    for program in (resume(launcher), *clients):
        program.ended_with(0)
    assert_same(references(OWN_STATE), launcher.folder / "server/r")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "point", "count", "run"),
    in_turns(
        [(p, n, OWN_STATE) for p, n in CLIENT_POINTS.items()]
        + [(p, n, AVERAGED) for p, n in {"front.before_update": 12, **WEIGHTS_POINTS}.items()]
    ),
    indirect=["launcher"],
)
def test_a_client_that_dies_anywhere_comes_back(
    launcher: Launcher, point: str, count: int, run: dict[str, object], references: References
) -> None:
    server = launcher.server(*options_of(run))
    crash = {VARIABLE: f"{point}:{count}"}
    other, dies = (
        launcher.client("--client-id", k, *ALLOW, env=crash if k else {}) for k in range(2)
    )
    was_killed(dies)
    if point == "run.before_goodbye":  # all is done; nobody waits for long
        programs = [server, other]
    else:
        programs = [server, other, launcher.client("--client-id", 1, *ALLOW)]
    for program in programs:
        program.ended_with(0)
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.parametrize(
    ("launcher", "what", "count", "within", "least", "batch"),
    [
        pytest.param("wss", "cut", 25, 400_000, 10, 50, marks=pytest.mark.slow),
        ("ws", "flip", 12, 200_000, 5, RUN["batch_size"]),
    ],
    indirect=["launcher"],
)
def test_connections_that_break_or_bits_that_flip_anywhere_leave_no_trace(
    launcher: Launcher, references: References,
    what: str, count: int, within: int, least: int, batch: int,
) -> None:  # fmt: skip
    """So many of them, each within so many bytes of a connection."""
    draws, run = random.Random(5), RUN | {"batch_size": batch}

    def done() -> int:
        return link.num_cut if what == "cut" else link.num_flipped

    def after() -> float:
        return draws.uniform(0, within) if done() < count else float("inf")

    link = SlowLink("127.0.0.1", launcher.port, **{f"{what}_after": after})
    server = launcher.server(*options_of(run))
    clients = [
        launcher.client("--client-id", k, *ALLOW, *launcher.at(link.address)) for k in range(3)
    ]
    try:
        for program in (server, *clients):
            program.ended_with(0)
    finally:
        link.close()
    assert done() >= least
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.slow
def test_a_link_that_goes_dark_is_noticed_and_left(
    launcher: Launcher, references: References
) -> None:
    """Both ends notice that nothing is heard, though nobody closes the connection."""
    run = RUN | {"clients": 2}
    link = SlowLink("127.0.0.1", launcher.port, bytes_per_s=400_000)
    server = launcher.server(*options_of(run), "--peer-timeout", 2)
    timeouts = ["--peer-timeout", 2, *ALLOW]
    clients = [launcher.client(*timeouts), launcher.client(*timeouts, "--server", link.address)]
    try:
        wait_for(server, "round 1/3")
        link.go_dark(4)
        wait_for(server, "sent nothing for 2 seconds")
        for program in (server, *clients):
            program.ended_with(0)
    finally:
        link.close()
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.slow
def test_a_peer_that_is_busy_is_not_taken_for_dead(launcher: Launcher) -> None:
    """Its data take three times as long to load as anybody may be silent."""
    options = ["--clients", 2, "--model", "mlp", "--rounds", 1, "--batch-size", 500]
    timeout = ["--peer-timeout", 1]
    server = launcher.server(
        *options, *timeout, "--dataset", "tests.support.slow_data:slow_to_load"
    )
    allow = ["--allow-import", "tests.support.slow_data:slow_to_load", *timeout]
    for program in (server, launcher.client(*allow), launcher.client(*allow)):
        program.ended_with(0)
    assert "is away" not in server.out


SKIP = ["--on-missing", "skip", "--round-timeout", 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "crash", "step"),
    [
        ({"scheme": "sl"}, f"front.before_update:{STEPS + 4}", 4),
        ({"scheme": "sflv1"}, f"front.before_update:{STEPS + 4}", 4),
        ({"scheme": "sflv2"}, f"front.before_update:{STEPS + 4}", 4),
        ({"scheme": "sflv2", "cut": "3,9"}, f"front.before_update:{STEPS + 4}", 4),
        ({"scheme": "sflv1", "cut": "3,6,9"}, f"front.before_update:{STEPS + 4}", 4),
        ({"scheme": "sflv3", "optimizer_state": "keep"}, f"front.before_update:{STEPS + 1}", 1),
        ({"scheme": "sl", "optimizer_state": "keep"}, "trained.before_said:2", STEPS),
        ({"scheme": "fl"}, "trained.before_said:2", 0),
        ({"scheme": "sync-sgd"}, "trained.before_said:2", STEPS),
        ({"scheme": "sflv1"}, "validation.before:2", None),
    ],
)
def test_rounds_close_without_a_client_that_is_gone_for_good(
    launcher: Launcher, tmp_path: Path, scheme: dict[str, object], crash: str, step: int | None
) -> None:
    """As in a simulation without it from that step on; after validation, from the next round."""
    run = RUN | scheme
    server = launcher.server(*options_of(run), *SKIP)
    clients = [
        launcher.client("--client-id", k, *ALLOW, env={VARIABLE: crash} if k == 1 else {})
        for k in range(3)
    ]
    was_killed(clients[1])
    for program in (server, clients[0], clients[2]):
        program.ended_with(0)
    away = Away(1, 2) if step is None else Away(1, 1, step)
    whole, folder = reference(tmp_path / "whole", run, [away]), launcher.folder / "server/r"
    found = compare(whole, folder)
    if step is None:  # it validated in the simulation
        assert all(re.search(r"round(_001|s)\.csv: differs", line) for line in found.lines)
    else:
        assert found.lines == []
    rows = list(csv.DictReader((folder / "rounds.csv").read_text().splitlines()))
    assert ["1" in row["took_part"].split(";") for row in rows] == [True, step is None, False]
    assert "client_1: client_1 closed the connection" in rows[-1]["missing"]


@pytest.mark.slow
def test_a_client_that_was_stopped_too_long_rejoins_at_the_next_round(launcher: Launcher) -> None:
    run = RUN | {"rounds": 400, "clients": 2, "keep_tensors": "none"}
    server, stays, stopped = start(launcher, run, *SKIP)
    wait_for(server, "round 2/400")
    send_signal(stopped, signal.SIGSTOP)
    wait_for(server, "going on without client_1: client_1 made no progress for")
    send_signal(stopped, signal.SIGCONT)
    wait_for(server, "client_1 is back")
    assert "client_1 made no progress for" in stopped.out
    line = launcher.folder / "server/r/rounds.csv"

    def took_part() -> list[str]:
        return [row["took_part"] for row in csv.DictReader(line.read_text().splitlines())]

    done = len(took_part())
    wait_for(server, f"round {done + 3}/400")
    assert "0" in took_part()
    assert set(took_part()[-1].split(";")) == {"0", "1"}
    wait_for(stopped, "going on with round")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    for client in (stays, stopped):
        send_signal(client, signal.SIGINT)
        client.ended_with(3)


def test_below_the_fewest_clients_a_round_waits(launcher: Launcher, references: References) -> None:
    """It says so, can be stopped, and goes on."""
    server, *clients = start(launcher, RUN, *SKIP, "--min-clients", 3)
    wait_for(server, "round 1/3")
    send_signal(clients[1], signal.SIGKILL)
    wait_for(server, "client_1 is away")
    wait_for(clients[0], "waiting for client_1")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    clients[1] = launcher.client("--client-id", 1, *ALLOW)
    for program in (resume(launcher), *clients):
        program.ended_with(0)
    assert_same(references(RUN), launcher.folder / "server/r")


@pytest.mark.parametrize(
    ("clients", "participation", "crash"),
    [
        (3, 1.0, "front.before_update:3"),
        (3, 1.0, "validation.before:1"),
        (6, 0.5, "front.before_update:3"),  # enough others are connected, and were not drawn
    ],
)
def test_a_round_waits_for_as_many_clients_as_its_rule_needs(
    launcher: Launcher, references: References, clients: int, participation: float, crash: str
) -> None:
    run = RUN | {"aggregation": "trimmed-mean", "rounds": 2}
    run |= {"clients": clients, "participation": participation}
    dies, *_ = draw(from_values(RunConfig, dict(run), "the test"), range(clients), 0)
    server = launcher.server(*options_of(run), *SKIP)
    programs = [
        launcher.client("--client-id", k, *ALLOW, env={VARIABLE: crash} if k == dies else {})
        for k in range(clients)
    ]
    was_killed(programs.pop(dies))
    time.sleep(3)  # three times as long as a round waits for others
    again = launcher.client("--client-id", dies, *ALLOW)
    for program in (again, server, *programs):
        program.ended_with(0)
    connected = "fewer than 3 connected clients" if clients == 3 else "fewer than 5 connected"
    assert connected in server.out
    assert "going on without" not in server.out
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.slow
def test_a_resumed_run_draws_the_clients_that_its_rule_needs_from_the_connected(
    launcher: Launcher,
) -> None:
    """One that was drawn is gone for good: the round waits for it until the server is resumed."""
    run = RUN | {"aggregation": "trimmed-mean", "clients": 6, "participation": 0.5, "rounds": 2}
    gone, *_ = draw(from_values(RunConfig, dict(run), "the test"), range(6), 0)
    server = launcher.server(*options_of(run), *SKIP)
    crash = {VARIABLE: "front.before_update:3"}
    clients = [
        launcher.client("--client-id", k, *ALLOW, env=crash if k == gone else {}) for k in range(6)
    ]
    was_killed(clients.pop(gone))
    wait_for(server, f"client_{gone} is away")
    send_signal(server, signal.SIGINT)
    server.ended_with(3)
    for program in (resume(launcher, *SKIP), *clients):
        program.ended_with(0)
    rows = read_summary((launcher.folder / "server/r/rounds.csv").read_bytes())
    assert all(len(row["took_part"].split(";")) == 3 for row in rows)
    assert replay.check(load(launcher.folder / "server/r")).findings == []


def test_absences_that_leave_a_rule_too_few_are_refused_before_the_start(tmp_path: Path) -> None:
    run = RUN | {"scheme": "sflv2", "aggregation": "trimmed-mean", "clients": 4}
    for absences in ("1:1-2,3:1", "1:0,3:2", "1:0-2,3:0-2"):
        away = [Away.parse(text) for text in absences.split(",")]
        with pytest.raises(
            ConfigError, match=r"--away leaves round \d/\d+ with 2 clients; .* needs 3"
        ):
            reference(tmp_path, run, away)
        assert list(tmp_path.iterdir()) == []
    reference(tmp_path, run, [Away(1, 0, back=1), Away(3, 1)])
    with pytest.raises(ConfigError, match=r"--away leaves round 2/\d+ with 0 clients; .* needs 1"):
        reference(tmp_path, run | {"aggregation": "fedavg"}, [Away(k, k // 2) for k in range(4)])


def test_what_a_client_has_alone_is_not_made_up(launcher: Launcher, references: References) -> None:
    """It ends with one line, the server waits; with its folder back the run ends the same."""
    server = launcher.server(*options_of(OWN_STATE))
    crash = {VARIABLE: "trained.before_said:3"}
    other, dies = (
        launcher.client("--client-id", k, *ALLOW, env=crash if k else {}) for k in range(2)
    )
    was_killed(dies)
    folder = launcher.folder / "client/r/client_1"
    newest, before = checkpoint_paths(folder)
    newest.rename(launcher.folder / "hidden")  # the one before is whole, and must not be used
    assert before.exists()
    line = launcher.client("--client-id", 1, *ALLOW).ended_with(1)
    assert "lacks what only client_1 has of round 3: start it where it ran before" in line
    (launcher.folder / "hidden").rename(newest)
    for program in (server, other, launcher.client("--client-id", 1, *ALLOW)):
        program.ended_with(0)
    assert_same(references(OWN_STATE), launcher.folder / "server/r")


@pytest.mark.parametrize("scheme", ["sflv1", "sflv2"])
def test_a_round_that_everybody_left_begins_again_with_who_is_here(
    launcher: Launcher, scheme: str
) -> None:
    run = RUN | {"scheme": scheme, "participation": 0.34, "optimizer_state": "keep"}
    (drawn,) = draw(from_values(RunConfig, dict(run), "the test"), range(3), 0)
    server = launcher.server(*options_of(run), *SKIP)
    crash = {VARIABLE: "front.before_update:3"}
    clients = [
        launcher.client("--client-id", k, *ALLOW, env=crash if k == drawn else {}) for k in range(3)
    ]
    was_killed(clients.pop(drawn))
    for program in (server, *clients):
        program.ended_with(0)
    rows = read_summary((launcher.folder / "server/r/rounds.csv").read_bytes())
    assert all(row["took_part"] not in ("", str(drawn)) for row in rows)
    assert all(f"client_{drawn}: " in row["missing"] for row in rows)
    assert replay.check(load(launcher.folder / "server/r")).findings == []


def test_whoever_is_back_first_goes_on(launcher: Launcher) -> None:
    """All are lost, and one comes back: the round does not wait for a certain one."""
    run = RUN | {"clients": 2}
    server = launcher.server(*options_of(run), *SKIP)
    crash = {VARIABLE: "front.before_update:3"}
    for client in [launcher.client("--client-id", k, *ALLOW, env=crash) for k in range(2)]:
        was_killed(client)
    wait_for(server, "client_1 is away")
    wait_for(server, "client_0 is away")
    for program in (launcher.client("--client-id", 1, *ALLOW), server):
        program.ended_with(0)
    assert "going on without client_0" in server.out
    assert replay.check(load(launcher.folder / "server/r")).findings == []


def test_survivors_go_on_with_more_rounds(launcher: Launcher, references: References) -> None:
    run = RUN | {"clients": 2}
    server, *clients = start(launcher, run | {"rounds": 2}, "--seed", 0)
    wait_for(server, "round 1/2")
    send_signal(server, signal.SIGKILL)
    was_killed(server)
    for program in (resume(launcher, "--rounds", 3), *clients):
        program.ended_with(0)
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.slow
def test_a_client_comes_back_to_a_server_that_was_resumed_rounds_ago(
    launcher: Launcher, references: References
) -> None:
    run = OWN_STATE | {"rounds": 8}
    server = launcher.server(*options_of(run), env={VARIABLE: "checkpoint.before_rename:5"})
    crash = {VARIABLE: "validation.before:7"}
    other, dies = (
        launcher.client("--client-id", k, *ALLOW, env=crash if k else {}) for k in range(2)
    )
    was_killed(server)
    server = resume(launcher)
    was_killed(dies)
    for program in (server, other, launcher.client("--client-id", 1, *ALLOW)):
        program.ended_with(0)
    assert_same(references(run), launcher.folder / "server/r")


@pytest.mark.slow
def test_a_server_that_skips_goes_on_with_who_missed_rounds(launcher: Launcher) -> None:
    """In sflv3 it goes on from the front that it had, whatever the others have by now."""
    run = OWN_STATE | {"rounds": 6}
    crash = {VARIABLE: "front.before_update:12"}
    server = launcher.server(*options_of(run), *SKIP, env={VARIABLE: "average.before:5"})
    stays, dies = (
        launcher.client("--client-id", k, *ALLOW, env=crash if k else {}) for k in range(2)
    )
    was_killed(dies)
    was_killed(server)
    server = resume(launcher, *SKIP)
    for program in (server, stays, launcher.client("--client-id", 1, *ALLOW)):
        program.ended_with(0)
    rows = read_summary((launcher.folder / "server/r/rounds.csv").read_bytes())
    assert [set(row["took_part"]) >= {"1"} for row in rows][-1]
    assert replay.check(load(launcher.folder / "server/r")).findings == []


@pytest.mark.slow
def test_weights_through_a_folder_are_not_in_the_way_of_a_round_that_is_redone(
    launcher: Launcher, tmp_path: Path
) -> None:
    """With another set of clients it has another average."""
    place = f"dir:{tmp_path / 'place'}"
    run = RUN | {"clients": 2, "weights": place}
    allow = [*ALLOW, "--allow-weights", place]
    server = launcher.server(*options_of(run), *SKIP, env={VARIABLE: "checkpoint.before_rename:3"})
    clients = [launcher.client("--client-id", k, *allow) for k in range(2)]
    was_killed(server)
    send_signal(clients[1], signal.SIGKILL)
    was_killed(clients[1])
    for program in (resume(launcher, *SKIP), clients[0]):
        program.ended_with(0)
    assert replay.check(load(launcher.folder / "server/r")).findings == []


@pytest.mark.slow
def test_the_place_of_a_client_whose_connection_is_dead_can_be_taken(
    launcher: Launcher, references: References
) -> None:
    """Its machine vanished without a word, and another has been started instead."""
    run = RUN | {"clients": 2}
    link = SlowLink("127.0.0.1", launcher.port, bytes_per_s=400_000)
    server = launcher.server(*options_of(run), "--peer-timeout", 8)
    first = launcher.client("--client-id", 0, *ALLOW)
    gone = launcher.client("--client-id", 1, *ALLOW, "--server", link.address)
    try:
        wait_for(server, "round 1/3")
        link.go_dark(60)
        send_signal(gone, signal.SIGKILL)
        was_killed(gone)
        time.sleep(5)  # it is missed after two heartbeats, long before its timeout
        for program in (launcher.client("--client-id", 1, *ALLOW), server, first):
            program.ended_with(0)
    finally:
        link.close()
    assert "client_1 has connected anew" in server.out
    assert_same(references(run), launcher.folder / "server/r")
