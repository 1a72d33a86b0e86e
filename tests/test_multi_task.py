"""Several servers with a task each: equal to one network with several heads, from any kill."""

import contextlib
import re
import socket
from pathlib import Path

import pytest

import sfl.archive
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.runtime.preflight import check_run
from sfl.strategy.recipe import Recipe
from sfl.transport.tokens import write_tokens
from sfl.wire.framing import encode_head
from sfl.wire.messages import Message
from sfl.wire.messages import MessageType as M
from tests.support.launch import Launcher, options_of, wait_for
from tests.support.parties import SERVER, Chain, follower_folders, replayed, weights_of_all
from tests.support.plain_tasks import PlainTasks, states_of
from tests.support.proxy import Proxy
from tests.support.runs import ALLOW, BN_DROPOUT, FAST
from tests.support.simulations import simulated
from tests.support.weights import assert_equal

MODEL = {"model": BN_DROPOUT, "cut": 6, "batch_size": 200, "topology": "multi-task"}
TWO, THREE = {"tasks": "digit,parity"}, {"tasks": "class,digit,parity"}
JOINED = {"topology": "vertical-multi-task", "partition": "vertical", "label_client": 1}


# Exactness


@pytest.mark.parametrize(("state", "weights"), [("keep", "1,0.3,2"), ("reset", "")])
def test_all_servers_together_equal_one_network_with_several_heads(
    tmp_path: Path, state: str, weights: str
) -> None:
    options = MODEL | THREE | {"clients": 1, "task_weights": weights, "optimizer_state": state}
    run = simulated(tmp_path, **options)
    plain = PlainTasks(RunConfig(**options, rounds=2))
    plain.train()
    for ours, theirs in zip(states_of(run, plain.run.tasks), plain.states(), strict=True):
        assert_equal(ours, theirs, at_least=7)


KILLS = [
    (
        "alone",
        "sflv1",
        "keep",
        {"client_0": "front.after_update:3", "task_parity": "average.after:1"},
    ),
    ("alone", "sflv2", "reset", {"task_parity": "step.after_answer:5"}),
    ("hosted", "sl", "keep", {"task_parity": "step.after_update:7", SERVER: "validation.after:1"}),
    (
        "joined",
        "sflv3",
        "reset",
        {"client_1": "trained.before_said:1", "task_parity": "checkpoint.before_rename:2"},
    ),
    (
        "joined",
        "sflv1",
        "keep",
        {SERVER: "step.after_update:4", "task_parity": "checkpoint.after_rename:2"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "scheme", "state", "crashes"), KILLS)
def test_killed_parties_leave_the_weights_of_one_process(
    launcher: Launcher,
    tmp_path: Path,
    clients: str,
    scheme: str,
    state: str,
    crashes: dict[str, str],
) -> None:
    options = MODEL | TWO | (JOINED if clients == "joined" else {})
    options |= {"clients": 2, "scheme": scheme, "optimizer_state": state}
    whole = simulated(tmp_path / "whole", **options, keep_tensors="all")
    of_server = [*options_of(options), "--rounds", 2, "--run", "r"]
    launcher.transport = "wss" if scheme == "sl" else "tcp"
    parties = Chain(launcher, 0, 2, of_server, ALLOW, tasks=["parity"], hosts=clients == "hosted")
    if parties.hosts:  # who has been reached is waited for longer, as any server that has gone
        parties.of_clients = ["--connect-timeout", 0.1]
    run = parties.run(crashes)
    assert_equal(weights_of_all(run), weights_of_all(whole))
    for folder in (run, *follower_folders(run)):
        checked, models = replayed(folder, BN_DROPOUT)
        assert (checked, models >= 2) == (64 if clients == "joined" else 32, True)


# What each server is told


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_each_server_is_told_the_labels_of_its_own_task_alone(
    launcher: Launcher, tmp_path: Path
) -> None:
    """With tokens, whose proofs name the server; what arrives, and what is recorded."""
    token = tmp_path / "token"
    write_tokens(token, ["a-token-of-all-parties-0123456789"])
    shared = ["--token-file", token, *ALLOW]
    of_server = [*options_of(MODEL | TWO), "--clients", 2, "--rounds", 1, "--run", "r", *shared]
    parties = Chain(launcher, 0, 2, of_server, shared, tasks=["parity"])
    proxies = {SERVER: Proxy(launcher.port), "parity": Proxy(parties.task_ports["parity"])}
    parties.at_tasks = {"parity": proxies["parity"].port}
    parties.first_port = proxies[SERVER].port
    for name in parties.names:  # servers first
        program = parties.start(name)
        if "client" not in name:
            wait_for(program, "listening")
    for program in parties.programs.values():
        program.ended_with(0)
    for proxy in proxies.values():
        proxy.close()
    run = parties.folder
    folders = {SERVER: run, "parity": tmp_path / "task_parity/r"}
    labels = {
        name: [step.labels.numpy().tobytes() for step in sfl.archive.open(folder).steps()]
        for name, folder in folders.items()
    }
    assert [len(own) for own in labels.values()] == [16, 16]
    for name, proxy in proxies.items():
        passed = b"".join(bytes(s) for c in proxy.connections for s in c.streams.values())
        known = {
            task: [y for y in theirs if y in passed or y in bytes_in(folders[name])]
            for task, theirs in labels.items()
        }
        assert known == {task: theirs if task == name else [] for task, theirs in labels.items()}
        sent = [m for c in proxy.connections for _, m in c.messages]
        assert {tuple(m.get("classes", list)) for m in sent if m.type is M.REQUEST_TO_START} == {
            ("even", "odd") if name == "parity" else tuple("0123456789")
        }
    weights = weights_of_all(simulated(tmp_path / "whole", **MODEL, **TWO, clients=2, rounds=1))
    assert_equal(weights_of_all(run), weights)


def test_strangers_end_themselves_alone(launcher: Launcher) -> None:
    """Who is not registered at the main server, or has no token, takes nobody's place."""
    options = ["--clients", 1, *FAST, "--rounds", 1, "--run", "r", "--topology", "multi-task"]
    parties = Chain(launcher, 0, 1, [*options, "--tasks", "digit,parity"], [], tasks=["parity"])
    parties.start(SERVER), parties.start("task_parity")
    wait_for(parties.programs["task_parity"], "listening")
    strangers = []
    hello = {"client_id": 0, "instance": "0" * 32, "heartbeat_s": 1.0, "fingerprint": {}}
    for kind, content in [
        (M.REGISTER, hello), (M.REGISTER, hello | {"client_id": -1}), (M.CHECK, hello),
        (M.REGISTER, "x"), (M.GO_ON, {}), (M.START_TRAINING, {}),
    ]:  # fmt: skip
        stranger = socket.create_connection(("127.0.0.1", parties.task_ports["parity"]))
        stranger.sendall(encode_head(Message(kind, content=content)))
        strangers.append(stranger)
    for stranger in strangers:
        stranger.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
        stranger.close()
    parties.start("client_0")
    for program in parties.programs.values():
        program.ended_with(0)


# Refusals


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"tasks": ""}, "2 to 8 different tasks"),
        ({"tasks": "digit,digit"}, "2 to 8 different tasks"),
        ({"tasks": "digit,age"}, "--tasks age: must be one of class, digit, parity"),
        ({"task_weights": "1"}, "2 numbers above 0"),
        ({"task_weights": "1,nan"}, "2 numbers above 0"),
        ({"topology": "vanilla"}, "without --topology multi-task"),
        ({"scheme": "fl"}, "a scheme with a cut"),
        ({"class_weights": "1,2"}, "none or balanced"),
        ({"weights": "dir:/x"}, "--weights dir:/x"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        Recipe.of(RunConfig(**MODEL | TWO | options))


def test_a_task_that_the_labels_do_not_have_is_refused_before_the_first_client() -> None:
    run = RunConfig(dataset="fashion-mnist", topology="multi-task", tasks="class,parity")
    with pytest.raises(ConfigError, match="--tasks parity: the classes T-shirt"):
        check_run(run)
