"""Several servers with a task each: equal to one network with several heads, from any kill."""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

import sfl.archive
import sfl.conversation.round as conversation_round
from sfl.archive.layout import MANIFEST
from sfl.archive.manifest import DROPPED, Entry, manifest_line
from sfl.cli import main_client, main_server
from sfl.config import RunConfig
from sfl.conversation.followed import FollowedRounds
from sfl.conversation.party import ClientParty
from sfl.conversation.report import DataReport, send_report
from sfl.conversation.task_server import TaskRounds
from sfl.data.datasets import dataset_spec
from sfl.data.private_data import load_own
from sfl.errors import ConfigError, DataError, RunError
from sfl.nodes import NodeConfig
from sfl.reports.gathered import gather
from sfl.runtime import following, lobby, task_servers
from sfl.runtime.preflight import check_run
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.transport.tokens import write_tokens
from sfl.wire.driver import Conversation
from sfl.wire.framing import encode_head
from sfl.wire.link import Link
from sfl.wire.messages import FILE_TYPES, Message
from sfl.wire.messages import MessageType as M
from tests.support import launch
from tests.support.launch import Launcher, options_of, wait_for, was_killed
from tests.support.parties import SERVER, Chain, follower_folders, is_over, replayed, weights_of_all
from tests.support.plain_tasks import PlainTasks, states_of
from tests.support.proxy import UP, Proxy
from tests.support.runs import ALLOW, BN_DROPOUT, FAST
from tests.support.simulations import simulated
from tests.support.weights import assert_equal

MODEL = {"model": BN_DROPOUT, "cut": 6, "batch_size": 200, "topology": "multi-task"}
TWO, THREE = {"tasks": "digit,parity"}, {"tasks": "parity,class,digit"}
JOINED = {"topology": "vertical-multi-task", "partition": "vertical", "label_client": 1}


# Exactness


@pytest.mark.slow
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
    ("drawn", "sflv2", "reset", {"task_parity": "step.after_answer:5"}),
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
    options |= {"participation": 0.5} if clients == "drawn" else {}  # one waits in each round
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
        assert (checked, models >= 2) == ({"joined": 64, "drawn": 16}.get(clients, 32), True)
        assert is_over(folder)


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
        sent = [m for c in proxy.connections for way, m in c.messages if way == UP]
        with_files = [m for m in sent if m.type in FILE_TYPES and m.content]
        assert all(m.content.keys() == {"part"} for m in with_files)  # nothing beside the files
        assert {tuple(m.get("classes", list)) for m in sent if m.type is M.REQUEST_TO_START} == {
            ("even", "odd") if name == "parity" else tuple("0123456789")
        }
    weights = weights_of_all(simulated(tmp_path / "whole", **MODEL, **TWO, clients=2, rounds=1))
    assert_equal(weights_of_all(run), weights)


def test_strangers_end_themselves_alone(launcher: Launcher) -> None:
    """Who is not registered at the main server, or has no token, takes nobody's place."""
    options = ["--clients", 1, *FAST, "--rounds", 1, "--run", "r", "--topology", "multi-task"]
    parties = Chain(launcher, 0, 1, [*options, "--tasks", "digit, parity"], [], tasks=["parity"])
    parties.start(SERVER), parties.start("task_parity")
    wait_for(parties.programs["task_parity"], "listening")
    strangers = []
    hello = {"client_id": 0, "instance": "0" * 32, "heartbeat_s": 1.0, "fingerprint": {}}
    for kind, content in [
        (M.REGISTER, hello), (M.REGISTER, hello | {"client_id": -1}), (M.CHECK, hello),
        (M.REGISTER, "x"), (M.GO_ON, {}), (M.START_TRAINING, {}),
        (M.END_RUN, "x"),
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


def lying(argv: list[str]) -> int:
    """Be a client that tells a task's server something else than the main server."""
    lie = argv.pop()

    def told(link: Link, report: DataReport) -> None:
        other = {"classes": ("a", "b"), "num_samples": {**report.num_samples, "train": 2**31 - 1}}
        send_report(link, dataclasses.replace(report, **{lie: other[lie]}))

    def first_says_that_all_is_over(party: ClientParty, round_index: int) -> Conversation[None]:
        for side in party.others:
            at = party.at(party.run.rounds)
            side.link.send_message_as_json(M.TRAINING_DONE, content={}, at=at)
            side.link.send_message_as_json(M.UNREGISTER)
        return (yield from next_round(party, round_index))

    next_round = conversation_round._next_round
    if lie == "over":
        conversation_round._next_round = first_says_that_all_is_over
    else:
        task_servers.send_report = told
    return main_client(argv)


@pytest.mark.slow
def test_clients_that_lie_to_a_tasks_server_end_themselves_alone(
    launcher: Launcher, tmp_path: Path
) -> None:
    options = MODEL | TWO | {"clients": 3, "rounds": 2}
    of_server = [*options_of(options), "--run", "r"]
    parties = Chain(launcher, 0, 3, of_server, ALLOW, tasks=["parity"])
    for name in parties.names[:-1]:
        wait_for(parties.start(name), "client_" if name.startswith("client") else "listening")
    for lie in ("classes", "num_samples", "over"):
        own = [*launcher.at(f"127.0.0.1:{launcher.port}"), "--out", tmp_path, *ALLOW]
        liar = launcher.start("liar", lying, [*own, "--client-id", 2, lie])
        assert liar.wait() == 1, (lie, liar.out)
    parties.start("client_2")
    for program in parties.programs.values():
        program.ended_with(0)
    assert_equal(
        weights_of_all(parties.folder), weights_of_all(simulated(tmp_path / "w", **options))
    )


def leaving(argv: list[str]) -> int:
    """Be a client that is killed as soon as the main server has said that the run is over."""
    next_round = conversation_round._next_round

    def killed_at_the_end(party: ClientParty, round_index: int) -> Conversation[Message | None]:
        if party.others and round_index == party.run.rounds:
            party.others = ()  # none is told
            yield from next_round(party, round_index)
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from next_round(party, round_index))

    conversation_round._next_round = killed_at_the_end
    return main_client(argv)


def impatient(argv: list[str]) -> int:
    """Be a server that waits less for those who are away at the end."""
    following.ALONE_S = following.GOODBYE_S = lobby.GOODBYE_S = 0.5
    return main_server(argv)


@pytest.mark.slow
def test_a_client_that_is_killed_at_the_end_keeps_no_tasks_server(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "main_server", impatient)
    options = MODEL | TWO | {"clients": 2, "rounds": 1}
    of_server = [*options_of(options), "--run", "r"]
    parties = Chain(launcher, 0, 2, of_server, ALLOW, tasks=["parity"])
    for name in parties.names[:-1]:
        wait_for(parties.start(name), "client_" if name.startswith("client") else "listening")
    monkeypatch.setattr(launch, "main_client", leaving)
    was_killed(parties.start("client_1"))
    for name in parties.names[:-1]:
        parties.programs[name].ended_with(0)


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


# What it leaves


def test_a_tasks_server_leaves_a_run_to_predict_with(tmp_path: Path) -> None:
    """The front lies with the main server; labels, figures and classes are the task's own."""
    options = {"model": "mlp", "clients": 2, "rounds": 1, "tasks": "digit,parity"}
    simulated(tmp_path, **options, topology="multi-task")
    parity = sfl.open_run(tmp_path / "task_parity/r")
    model, correct = parity.model(), 0
    with torch.no_grad():
        for k in range(2):
            kept = parity.predictions(k)
            batches = list(parity.batches(client=k))
            assert torch.equal(kept["labels"], torch.cat([y for _, y in batches]))
            assert torch.equal(kept["logits"], torch.cat([model(x) for x, _ in batches]))
            correct += int((kept["logits"].argmax(1) == kept["labels"]).sum())
    assert correct / 1000 == parity.rounds["test_acc"].iloc[-1]
    assert tuple(parity.classes) == ("even", "odd")
    assert is_over(parity.path)
    # What is not here is not taken from the main server's files, which have the same names.
    before, manifest = sfl.open_run(parity.path), parity.path / MANIFEST
    listed = manifest.read_bytes()
    for path in ("models/server_model_000.pt", "predictions/client_0_000.pt"):
        with manifest.open("a") as more:
            more.write(manifest_line(Entry(DROPPED, path, 0, "", round=0)) + "\n")
    now = sfl.open_run(parity.path)
    for ask in (now.back, functools.partial(now.predictions, 0)):
        with pytest.raises(RunError, match="was removed, as --keep-models asks"):
            ask()
    as_opened = parity.back().state_dict()
    manifest.unlink()
    assert_equal(before.back().state_dict(), as_opened, at_least=2)
    manifest.write_bytes(listed)
    # Beside the main server's folder it is a run of its own, whatever the seeds.
    digit = sfl.open_run(tmp_path / "server/r")
    assert [group.label for group in gather([digit, parity])] == ["role -", "role task:parity"]
    assert len(sfl.plot([digit, parity])[0].lines) == 4
    simulated(tmp_path, **options, topology="multi-task", run="s", seed=1)
    of_both = [tmp_path / "server/r", tmp_path / "task_parity/s"]
    assert len(gather([sfl.open_run(path) for path in of_both])) == 2


# Further columns of labels


def own_arrays(folder: Path, **more: np.ndarray) -> None:
    x = np.random.default_rng(0).random((40, 28, 28), np.float32)
    y, sides = np.arange(40) % 10, np.where(x[:, 0, 0] > 0.5, "right", "left")
    folder.mkdir(parents=True)
    both = {"x": x, "y": y, "x_test": x, "y_test": y, "y_side_test": sides}
    np.savez(folder / "own.npz", **both | {"y_side": sides} | more)


def test_a_task_may_be_a_further_column_of_own_data(tmp_path: Path) -> None:
    """Client 1 has samples of one side alone, and numbers: it names both."""
    own_arrays(tmp_path / "data/client_0")
    numbers = np.zeros(40, np.uint8)
    of_client_1 = {"y_side": numbers, "y_side_test": numbers}
    own_arrays(tmp_path / "data/client_1", **of_client_1, classes_side=np.array(["left", "right"]))
    run = RunConfig(
        dataset="mnist", partition="own", clients=2, rounds=1, model="mlp", batch_size=8, run="r",
        topology="multi-task", tasks="class,side",
    )  # fmt: skip
    simulate(run, NodeConfig(out=str(tmp_path), data_dir=str(tmp_path / "data")))
    side = sfl.open_run(tmp_path / "task_side/r")
    assert tuple(side.classes) == ("left", "right")
    labels = {k: torch.cat([s.labels for s in side.tensors(client=k)]) for k in range(2)}
    assert (set(labels[0].tolist()), set(labels[1].tolist())) == ({0, 1}, {0})
    assert replayed(tmp_path / "task_side/r", "") == (8, 1)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, "no array y_age"),
        ({"y_age": np.arange(40) / 2}, "y_age must hold one integer"),
        ({"y_age": np.arange(39)}, "y_age must hold one integer"),
        ({"y_age": np.arange(40) - 1}, "y_age has labels -1 to 38"),
        ({"y_age": np.arange(40)}, "no array y_age_test"),
        ({"y_age": np.arange(40), "classes_age": np.array(["0"])}, "1 classes"),
    ],
)
def test_columns_that_cannot_be_labels_are_named(
    tmp_path: Path, more: dict[str, np.ndarray], wanted: str
) -> None:
    own_arrays(tmp_path / "own", **more)
    run = RunConfig(partition="own", dataset="mnist")
    with pytest.raises(DataError, match=wanted):
        load_own(dataset_spec("mnist"), run, 0, tmp_path / "own", columns=["age"])


def test_the_run_is_over_when_all_clients_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = object.__new__(TaskRounds)
    rounds.num_samples = {0: {}, 1: {}}
    for said, all_have in ((set(), False), ({0}, False), ({0, 1}, True)):
        rounds.said_over = said
        assert rounds.is_over is all_have
    monkeypatch.setattr(FollowedRounds, "begin", lambda *round_and_client: None)
    rounds.plan = None
    rounds.begin(1, 0)  # a round that begins is a proof that it is not
    assert not rounds.said_over
