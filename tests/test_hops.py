"""Runs over hops: the same weights as in one process, from any kill, and no label on the way."""

import contextlib
import dataclasses
import math
import re
import socket
import time
from pathlib import Path

import pytest
import torch

import sfl.archive
import sfl.conversation.round as conversation_round
from sfl.archive.layout import LABELS
from sfl.archive.live_status import read_status
from sfl.cli import main_client
from sfl.config import RunConfig
from sfl.conversation.party import ClientParty
from sfl.errors import ConfigError, Damaged, ProtocolError
from sfl.files.torch_file import encode
from sfl.model.topology import HOPS, TOPOLOGIES, Holder, Relay, Stop, passing_links, route
from sfl.nodes import MOST_HOPS, NodeConfig, ServerNode
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.transport.tokens import write_tokens
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.framing import encode_head
from sfl.wire.messages import Message
from sfl.wire.messages import MessageType as M
from sfl.wire.seal import About, Seal, SealKey
from tests.support.launch import Launcher, free_port, options_of, wait_for
from tests.support.made_data import write_own
from tests.support.parties import SERVER, Chain, follower_folders, is_over, replayed, weights_of_all
from tests.support.plain_training import ordinary_training
from tests.support.proxy import Proxy
from tests.support.runs import ALLOW, BN_DROPOUT, FAST, LONG, removed
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, weights
from tests.support.wiretap import record

MODEL = {"model": BN_DROPOUT, "batch_size": 200}
ONE, TWO = {"topology": "multi-hop", "cut": "3,9"}, {"topology": "multi-hop", "cut": "3,6,9"}
U_SHAPED = {"topology": "u-shaped-hop", "cut": "3,6,9"}
TOKEN = "a token that hops, too, have: 0123456789".replace(" ", "-")
SEALED = {
    M.TRAINING_LABELS, M.TRAINING_GRADS, M.SEND_MODEL, M.SEND_AGGREGATED_MODEL,
    M.VALIDATION_LABELS, M.VALIDATION_RESULT, M.VALIDATION_DONE, M.TRAINING_DONE,
}  # fmt: skip
EXTENDED = {"topology": "extended-vanilla", "cut": "3,9", "partition": "vertical"}
OVER_HOP = ["--topology", "multi-hop", "--cut", "3,5", "--run", "r"]
ROWS = {"one": ONE, "two": TWO, "u": U_SHAPED, "extended": EXTENDED}
LAST = re.compile(r"(server_model|hop_\d)_001.pt/")


# The chain of parties


def test_what_is_between_two_others_passes_through() -> None:
    segments = TOPOLOGIES["u-shaped-hop"].segments(3)
    assert list(segments) == ["front", "hop_1", "back", "client_tail"]
    assert route(segments, Holder.HOP_1) == (
        Stop("hop_1", takes=0, gives=1, is_last=False),
        Relay(2, is_onward=False),
    )
    assert passing_links(segments) == {2}
    assert passing_links(TOPOLOGIES["multi-hop"].segments(3)) == frozenset()
    assert passing_links(TOPOLOGIES["u-shaped"].segments(2)) is None


def test_as_many_hops_as_options_name() -> None:
    assert len(HOPS) == MOST_HOPS


# Exactness


@pytest.mark.parametrize("row", ["one", "two", "u"])
def test_one_client_equals_the_unsplit_model(tmp_path: Path, row: str) -> None:
    options = MODEL | ROWS[row] | {"clients": 1}
    run = simulated(tmp_path, **options)
    last = {n.partition("/")[2]: t for n, t in weights_of_all(run).items() if "_001.pt" in n}
    plain = {name: options[name] for name in MODEL} | {"clients": 1}
    assert_equal(last, ordinary_training(RunConfig(**plain)))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sl", "sflv1", "sflv2", "sflv3"])
def test_a_hop_is_a_further_part_of_the_server(tmp_path: Path, scheme: str) -> None:
    """Server and hops share, copy and average their segments alike."""
    options = MODEL | {"clients": 3, "scheme": scheme}
    over_hops = simulated(tmp_path / "hops", **options, **TWO)
    without = simulated(tmp_path / "none", **options, cut=3)

    def of_clients(run: Path) -> dict[str, torch.Tensor]:
        return {n: t for n, t in weights(run).items() if n.startswith("client")}

    def of_server(run: Path) -> dict[str, torch.Tensor]:
        return {
            n.partition("/")[2]: t
            for n, t in weights_of_all(run).items()
            if n.startswith(("server_model_001", "hop")) and "_001.pt" in n
        }

    assert_equal(of_clients(over_hops), of_clients(without), at_least=1)
    assert_equal(of_server(over_hops), of_server(without))


@pytest.mark.parametrize(("scheme", "row"), [("sl", "one"), ("sflv1", "two")])
def test_a_part_without_samples_waits_for_nobody(tmp_path: Path, scheme: str, row: str) -> None:
    """A client is told to evaluate it when another one trains again; no hop goes back."""
    runs = []
    for k in range(2):
        write_own(tmp_path / f"client_{k}")
    for every in (0, 1):
        options = MODEL | ROWS[row] | {"scheme": scheme, "test_every": every, "rounds": 3}
        run = RunConfig(**options, clients=2, partition="own", run="r")  # type: ignore[arg-type]
        node = NodeConfig(data_dir=str(tmp_path), out=str(tmp_path / f"every_{every}"))
        runs.append(weights_of_all(simulate(run, node)))
    assert_equal(*runs)


@pytest.mark.parametrize(("cut", "scheme"), [("3,9", "sflv1"), ("5,7", "sl")])
def test_clients_joined_at_a_hop_equal_those_joined_at_the_server(
    tmp_path: Path, cut: str, scheme: str
) -> None:
    options = MODEL | {"clients": 3, "scheme": scheme, "partition": "vertical"}
    options |= {"label_client": 1, "optimizer_state": "keep"}
    at_hop = simulated(tmp_path / "hop", **options, topology="extended-vanilla", cut=cut)
    at_server = simulated(
        tmp_path / "server", **options, topology="vertical", cut=int(cut.partition(",")[0])
    )
    ours, theirs = weights_of_all(at_hop), weights_of_all(at_server)
    last = [{n.partition("/")[2]: t for n, t in w.items() if LAST.match(n)} for w in (ours, theirs)]
    assert_equal(*last, at_least=8)


KILLS = [
    ("extended", "sflv1", "keep", {"client_0": "front.after_update:3", "hop_1": "average.after:1"}),
    (
        "extended",
        "sl",
        "reset",
        {"hop_1": "step.after_answer:5", "client_1": "trained.before_said:1"},
    ),
    ("extended", "sflv2", "keep", {SERVER: "validation.after:1"}),
    ("one", "sflv1", "keep", {"hop_1": "step.after_answer:4"}),
    ("two", "sflv2", "reset", {"client_1": "front.after_update:3", "hop_2": "average.after:1"}),
    ("one", "sl", "keep", {"hop_1": "step.after_answer:20"}),
    ("two", "sflv2", "keep", {"hop_1": "checkpoint.before_rename:2"}),
    ("u", "sflv3", "reset", {"hop_1": "step.before_answer:7", SERVER: "step.after_update:9"}),
    ("one", "sl", "reset", {"hop_1": "average.after:1", SERVER: "validation.after:1"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "scheme", "state", "crashes"), KILLS)
def test_killed_parties_leave_the_weights_of_one_process(
    launcher: Launcher, tmp_path: Path, row: str, scheme: str, state: str, crashes: dict[str, str]
) -> None:
    num_clients = 3 if scheme == "sl" and row == "one" else 2
    options = MODEL | ROWS[row] | {"scheme": scheme, "optimizer_state": state}
    options["clients"] = num_clients
    whole = simulated(tmp_path / "whole", **options, keep_tensors="all")
    num_hops = len(follower_folders(whole))
    launcher.transport = "wss" if row == "u" else "tcp"
    of_server = [*options_of(options), "--rounds", 2, "--run", "r"]
    run = Chain(launcher, num_hops, num_clients, of_server, ALLOW).run(crashes)
    assert_equal(weights_of_all(run), weights_of_all(whole))
    for folder in (run, *follower_folders(run)):
        checked, models = replayed(folder, BN_DROPOUT)
        # A vertical run's clients take all steps together; the hop answers each of them.
        each = 32 + 4 * (num_clients - 2)  # of all clients
        num_gradients = 64 if row == "extended" and folder != run else each
        assert (checked, models >= 2) == (num_gradients, True)
        assert is_over(folder)


def test_a_run_that_is_ended_ends_its_hops(launcher: Launcher) -> None:
    chain = Chain(launcher, 1, 1, ["--clients", 1, *LONG, *OVER_HOP], [])
    for name in chain.names:
        chain.start(name)
    wait_for(chain.programs[SERVER], "round 2/1000")
    status, until = None, time.monotonic() + 60
    while not (status and 0 < (doing := status.now.clients[0]).steps < doing.of_steps):
        assert time.monotonic() < until, status  # of its signs of life, one a second
        status = read_status(launcher.folder / "hop_1/r")
        time.sleep(0.05)
    removed(chain.folder)
    for program in chain.programs.values():
        assert "removed" in program.ended_with(1)


def test_a_hop_keeps_to_its_run(launcher: Launcher) -> None:
    """A server that has another one on the same port ends its client, and not the hop."""
    chain = Chain(launcher, 1, 1, ["--clients", 1, *LONG, *OVER_HOP], [])
    for name in chain.names:
        chain.start(name)
    wait_for(chain.programs[SERVER], "round 2/1000")
    chain.programs[SERVER].process.kill()
    chain.programs[SERVER].process.join()
    chain.of_server = ["--clients", 1, *LONG]
    chain.start(SERVER)
    assert "the server has another run now" in chain.programs["client_0"].ended_with(1)
    assert chain.programs["hop_1"].process.is_alive()


# What passes, and what each party knows


def labels_of(run: Path) -> list[bytes]:
    """Return the bytes of each step's labels, as the server has recorded them."""
    steps = sfl.archive.open(run).steps()
    return [step.labels.numpy().tobytes() for step in steps if LABELS in step.entries]


def test_no_hop_is_told_a_label_or_who_is_beyond_its_neighbours(
    launcher: Launcher, tmp_path: Path
) -> None:
    token, secret = (str(tmp_path / name) for name in ("token", "secret"))
    for path in (token, secret):
        write_tokens(Path(path), [TOKEN if path == token else TOKEN[::-1]])
    shared = ["--token-file", token, *ALLOW]
    of_server = [*options_of(MODEL | TWO), "--clients", 2, "--rounds", 1, "--run", "r"]
    sealed = ["--seal-file", secret]
    chain = Chain(launcher, 2, 2, [*of_server, *shared, *sealed], shared)
    proxy = Proxy(chain.ports[2])  # between the hops
    chain.start(SERVER), chain.start("hop_2")
    chain.programs["hop_1"] = launcher.hop(1, chain.ports[1], proxy.port, *shared)
    for name in ("hop_1", "hop_2"):
        wait_for(chain.programs[name], "listening")
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"SFL\n" * 500, b""):  # at a hop as at a server
            with socket.create_connection(("127.0.0.1", chain.ports[int(name[-1])])) as stranger:
                stranger.sendall(sent)
    chain.of_others = [*shared, *sealed]
    for name in ("client_0", "client_1"):
        chain.start(name)
    for program in chain.programs.values():
        program.ended_with(0)
    proxy.close()

    whole = simulated(tmp_path / "whole", **MODEL, **TWO, clients=2, rounds=1)
    assert_equal(weights_of_all(chain.folder), weights_of_all(whole))
    labels = labels_of(chain.folder)
    assert len(labels) == 16
    passed = b"".join(bytes(s) for c in proxy.connections for s in c.streams.values())
    kept = b"".join(
        p.read_bytes() for f in follower_folders(chain.folder) for p in f.rglob("*") if p.is_file()
    )
    assert not [one for one in labels if one in passed or one in kept]
    told = [m for c in proxy.connections for _, m in c.messages if m.type in SEALED]
    assert {m.type for m in told} >= {M.TRAINING_LABELS, M.TRAINING_GRADS, M.VALIDATION_RESULT}
    assert all(m.content.keys() == {"number", "sealed"} for m in told)
    of_kinds = {(m.type, len(m.content["sealed"])) for m in told}
    assert len(of_kinds) == len({m.type for m in told})  # whatever the figures

    places = {SERVER: launcher.port, "hop_2": proxy.port, "hop_1": chain.ports[1]}
    theirs = {
        "client_0": {"hop_1"}, "client_1": {"hop_1"}, "hop_1": {"hop_2"}, "hop_2": {SERVER},
    }  # fmt: skip
    for name, neighbours in theirs.items():
        files = chain.folder.parents[1].glob(f"{name}/r" if "hop" in name else f"client/r/{name}")
        lies = b"".join(p.read_bytes() for f in files for p in f.rglob("*") if p.is_file())
        said = lies + (chain.programs[name].out + chain.programs[name].err).encode()
        known = {who for who, port in places.items() if f":{port}".encode() in said}
        assert known - {name} == neighbours, name


STRANGE = ["x", [], {}, {"client_id": "0"}, {"client_id": -1, "fingerprint": {"torch": []}}]


def test_strangers_end_themselves_alone(launcher: Launcher) -> None:
    """First messages that a hop can decode, and the server refuses, or the hop."""
    chain = Chain(launcher, 1, 1, ["--clients", 1, *FAST, *OVER_HOP, "--rounds", 1], [])
    chain.start(SERVER), chain.start("hop_1")
    wait_for(chain.programs["hop_1"], "listening")
    for kind in (M.REGISTER, M.CHECK, M.REQUEST_TO_START, M.TRAINING_GRADS, M.END_RUN):
        for content in STRANGE:
            payload = b"file" if kind is M.TRAINING_GRADS else b""
            message = Message(kind, content=content, payload=payload)
            with socket.create_connection(("127.0.0.1", chain.first_port)) as stranger:
                stranger.settimeout(0.5)
                stranger.sendall(encode_head(message) + payload)
                with contextlib.suppress(TimeoutError):  # some could go on
                    while stranger.recv(4096):
                        pass
    chain.start("client_0")
    for program in chain.programs.values():
        program.ended_with(0)


def ending(argv: list[str]) -> int:
    """Be a client that says what the server alone may say: the run has ended."""

    def end(party: ClientParty, round_index: int) -> Conversation[None]:
        party.link.send_message_as_json(M.END_RUN, content="over")
        yield party.link

    conversation_round._next_round = end
    return main_client(argv)


def test_a_client_does_not_end_the_run_of_a_hop(launcher: Launcher) -> None:
    chain = Chain(launcher, 1, 1, ["--clients", 1, *FAST, *OVER_HOP, "--rounds", 1], [])
    for name in (SERVER, "hop_1"):
        wait_for(chain.start(name), "listening")
    own = [*launcher.at(f"127.0.0.1:{chain.first_port}"), "--out", launcher.folder]
    liar = launcher.start("liar", ending, [*own, "--client-id", 0])
    liar.wait()
    chain.start("client_0")
    for program in chain.programs.values():
        program.ended_with(0)


def test_labels_are_found_where_they_are_sent(tmp_path: Path) -> None:
    """The search of the test above, on a run without hops."""
    run, connections = record(tmp_path, 1, [*options_of(MODEL), "--cut", 6, "--rounds", 1], ALLOW)
    passed = b"".join(bytes(s) for c in connections for s in c.streams.values())
    assert all(one in passed for one in labels_of(run))


# Seals


def sealed_pair(secret: bytes = b"") -> tuple[Seal, Seal]:
    """Return the seals of a client and of the server."""
    client, server = SealKey(), SealKey()
    about = About("r", 0, is_client=True, passing=frozenset({2}))
    of_server = dataclasses.replace(about, is_client=False)
    return client.agree(server.public, about), server.agree(client.public, of_server, secret)


LABELS_MESSAGE = Message(
    M.TRAINING_LABELS, content={"part": "x"}, at=Position("r", 0, 3, 0), payload=b"file"
)


def test_what_is_sealed_opens_at_the_other_end_once() -> None:
    client, server = sealed_pair()
    sent = client.close(LABELS_MESSAGE)
    assert b"file" not in bytes(sent.payload)
    assert server.open(sent) == LABELS_MESSAGE
    with pytest.raises(ProtocolError, match="earlier"):
        server.open(sent)


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b"other bytes, and enough"},
        {"at": Position("r", 0, 4, 0)},
        {"type": M.VALIDATION_LABELS},
        {"content": {"number": 1, "sealed": ""}},
    ],
)
def test_what_was_changed_on_its_way_does_not_open(change: dict[str, object]) -> None:
    client, server = sealed_pair()
    with pytest.raises(Damaged, match="changed"):
        server.open(dataclasses.replace(client.close(LABELS_MESSAGE), **change))


def test_a_seal_with_another_secret_does_not_open() -> None:
    client, server = sealed_pair(b"a secret of the server's alone")
    with pytest.raises(Damaged):
        server.open(client.close(LABELS_MESSAGE))


def test_what_a_hop_computes_with_is_not_sealed_but_the_figures_are() -> None:
    client, server = sealed_pair()
    grads = Message(
        M.TRAINING_GRADS, content={"loss": 1.5}, payload=b"g", at=Position("r", 0, 0, 0)
    )
    sent = server.close(grads)
    assert (bytes(sent.payload), "loss" in sent.content) == (b"g", False)
    assert client.open(dataclasses.replace(sent, at=sent.at._replace(link=1))).content == {
        "loss": 1.5
    }
    whole = dataclasses.replace(grads, at=grads.at._replace(link=2))
    assert bytes(server.close(whole).payload) != b"g"


def test_lengths_of_what_is_sealed_tell_nothing() -> None:
    client, _ = sealed_pair()
    figures = [(0.0, 1, 0), (-1.2345678901234567e-200, 200, 2**31 - 1), (math.nan, 0, 345)]
    labels = [torch.zeros(200).long(), torch.full((200,), 2**62), torch.arange(200)]
    lengths = set()
    for (loss, correct, count), y in zip(figures, labels, strict=True):
        content = {"loss": loss, "correct": correct, "per_class": [[count] * 10] * 3}
        plain = dataclasses.replace(LABELS_MESSAGE, content=content, payload=encode(y))
        sent = client.close(plain)
        lengths.add((len(sent.content["sealed"]), len(sent.payload)))
    assert len(lengths) == 1


def test_no_key_no_seal() -> None:
    about = About("r", 0, is_client=True, passing=frozenset())
    for key in ("", "00", "0" * 64):
        with pytest.raises(ProtocolError, match="key"):
            SealKey().agree(key, about)


# Refusals


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"weights": "dir:/x"}, "--weights dir:/x"),
        ({"max_clients": 9}, "--max-clients 9"),
        ({"class_weights": "balanced"}, "--class-weights balanced"),
        ({"server_order": "arrival"}, "--server-order arrival"),
        ({"cut": "3"}, "takes 2 to 9 cuts"),
        (
            EXTENDED | {"clients": 2, "party_models": "mlp,lenet5"},
            "--label-client 0 2 times: give --model mlp",
        ),
    ],
)
def test_runs_that_hops_cannot_serve_are_refused(options: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        Recipe.of(RunConfig(**TWO | options))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"role": "hop:1"}, "--next"),
        ({"next": "127.0.0.1:1"}, "--next"),
        ({"role": "hop:1", "next": "x:1", "resume": "x", "at_once": 1}, "--resume, --at-once"),
        ({"role": "hop:9", "next": "x:1"}, "--role hop:9"),
    ],
)
def test_options_of_a_hop(options: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        ServerNode(**options).check()


def test_a_hop_without_a_part_says_so(launcher: Launcher) -> None:
    launcher.server("--clients", 1, "--model", "mlp", "--rounds", 1)
    port = free_port()
    hop = launcher.hop(1, port, launcher.port)
    launcher.client(*launcher.at(f"127.0.0.1:{port}"))
    assert "mlp cut at 3, vanilla has no part for it" in hop.ended_with(1)
