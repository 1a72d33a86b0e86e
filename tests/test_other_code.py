"""Another release of SFL, or of a user's own model, on one machine: refused, or warned about."""

import contextlib
import json
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.hostile.insiders import try_insider
from experiments.hostile.target import Target
from experiments.support.same_run import compare
from sfl import __version__
from sfl.config import RunConfig
from sfl.conversation.join import Joined
from sfl.conversation.report import DataReport
from sfl.model.structure import MAX_DIGESTS, describe, difference, digests, weights_checksum
from sfl.nodes import NodeConfig
from sfl.runtime.same_model import MOST_BUILT, ServersModel
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.wire.framing import encode_head
from sfl.wire.link import Absent
from sfl.wire.messages import Message, MessageType
from tests.support.launch import Launcher, options_of, wait_for
from tests.support.models import VARIANT, of_this_machine

OWN = "tests.support.models:of_this_machine"
RUN = {"model": OWN, "cut": 3, "batch_size": 200, "rounds": 1, "clients": 1, "run": "r"}
OPTIONS = options_of(RUN)
ALLOW = ["--allow-import", OWN]


@pytest.mark.parametrize(
    ("variant", "where"),
    [
        ("class", "block 'act' differs"),
        ("slope", "block 'act' differs"),
        ("scale", "block 'scaled' differs"),
        ("mode", "block 'norm' differs"),
        ("frozen", "block 'fc2' differs"),
        ("block", "it has 7 blocks instead of 6"),
    ],
)
def test_a_client_of_another_structure_is_refused(
    launcher: Launcher, variant: str, where: str
) -> None:
    server = launcher.server(*OPTIONS)
    client = launcher.client(*ALLOW, env={VARIANT: variant})
    line = client.ended_with(1)
    assert f"client_0 builds another model for --model {OWN} than the server: {where}" in line
    assert f"the client runs SFL {__version__}, the server {__version__}" in line
    wait_for_line(launcher, f"than the server: {where}")
    assert not list(launcher.folder.glob("server/r/models/*_000.pt"))
    server.process.kill()


def wait_for_line(launcher: Launcher, text: str) -> None:
    """Wait until the server has said something, in its log or with its end."""
    server = launcher.programs[0]
    while text not in server.out + server.err:
        server.process.join(0.02)


def test_other_initial_weights_are_warned_about_and_the_servers_are_used(
    launcher: Launcher, tmp_path: Path
) -> None:
    server = launcher.server(*OPTIONS)
    launcher.client(*ALLOW, env={VARIANT: "weights"}).ended_with(0)
    server.ended_with(0)
    assert "warning: client_0 draws other initial weights than the server" in server.out
    whole = simulate(RunConfig(**RUN), NodeConfig(out=str(tmp_path / "whole")))
    assert compare(whole, launcher.folder / "server/r").lines == []


def test_the_same_code_is_not_warned_about(launcher: Launcher) -> None:
    """Whatever addresses, times and lambdas its modules keep."""
    server = launcher.server(*OPTIONS)
    launcher.client(*ALLOW).ended_with(0)
    server.ended_with(0)
    assert "warning" not in server.out


def test_a_client_of_another_release_is_warned_about(launcher: Launcher) -> None:
    """What it computes with is ``x``."""
    own = ["--partition", "own", "--batch-size", 4, "--clients", 1, "--rounds", 1]
    server = launcher.server("--model", "mlp", *own, "--peer-timeout", 2)
    wait_for(server, "listening")
    try_insider(Target("127.0.0.1", launcher.port), lambda insider: None)
    wait_for(server, f"warning: client_0 has sfl x against {__version__} of the server")


# Protocol 1


HEADS = {1: ">4sBBHIQ", 2: ">4sBBHIQII"}  # by the version of the protocol


def _read(sock: socket.socket, ours: int) -> dict[str, object]:
    """Read a frame of an earlier version, as its release does."""
    stream = sock.makefile("rb")
    head = stream.read(struct.calcsize(HEADS[ours]))
    magic, version, _, _, json_bytes, payload, *_ = struct.unpack(HEADS[ours], head)
    assert (magic, version, payload) == (b"SFL\n", ours, 0)
    answer = json.loads(stream.read(json_bytes))
    assert stream.read() == b""
    return answer


@pytest.mark.parametrize(
    ("first", "version"),
    [(MessageType.REGISTER, 1), (MessageType.AUTHENTICATE, 1), (MessageType.REGISTER, 2)],
)
def test_an_older_client_reads_which_release_to_install(
    launcher: Launcher, first: MessageType, version: int
) -> None:
    server = launcher.server("--model", "mlp", "--clients", 1, "--run", "r")
    wait_for(server, "listening")
    with socket.create_connection(("127.0.0.1", launcher.port), timeout=20) as sock:
        sock.sendall(encode_head(Message(first, content={"client_id": 0}), version=version))
        answer = _read(sock, version)
    assert answer["type"] == "INVALID_MESSAGE"
    release = f"SFL 0.{version} (protocol {version})"
    assert f"you run {release}: install SFL {__version__} on your" in answer["content"]
    wait_for(server, f"it runs {release}")
    assert f"install SFL {__version__} there" in server.out


def test_a_client_of_an_older_server_says_which_release_to_install(launcher: Launcher) -> None:
    with socket.create_server(("127.0.0.1", launcher.port)) as listener:

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.recv(4096)
                words = "the peer speaks version 2 of the protocol, we speak 1"
                sock.sendall(
                    encode_head(Message(MessageType.INVALID_MESSAGE, content=words), version=1)
                )
                while sock.recv(4096):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        line = launcher.client("--client-id", 0).ended_with(1)
        thread.join()
    assert "from the server: it runs SFL 0.1 (protocol 1)" in line
    assert f"install SFL {__version__} there, or the other's release here" in line


# The digest


def seen(model: nn.Module) -> tuple[str, ...]:
    return digests(describe(model), lambda: describe(model))


def test_every_block_has_its_digest_up_to_a_number() -> None:
    small = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert len(seen(small)) == 3
    large = nn.Sequential(*(nn.ReLU() for _ in range(3 * MAX_DIGESTS)))
    other = nn.Sequential(*large[:-1], nn.Tanh())
    assert len(seen(large)) == MAX_DIGESTS
    assert seen(large) != seen(other)
    names = [str(n) for n in range(3 * MAX_DIGESTS)]
    assert difference(seen(large), seen(other), names) == f"block '{MAX_DIGESTS - 2}' differs"


def test_what_torch_keeps_in_attributes_is_seen() -> None:
    one, other = (
        nn.Sequential(nn.TransformerEncoderLayer(8, heads, 8, dropout=0.0)) for heads in (2, 4)
    )
    assert seen(one) != seen(other)
    activations = [
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, activation=f))
        for f in (torch.relu, torch.sigmoid)
    ]
    assert seen(activations[0]) != seen(activations[1])


def test_a_layer_used_twice_is_another_structure_than_two_layers() -> None:
    layer = nn.Linear(2, 2)
    assert seen(nn.Sequential(layer, layer)) != seen(nn.Sequential(layer, nn.Linear(2, 2)))


def test_of_clients_word_few_models_are_built_and_none_for_large_samples() -> None:
    server = ServersModel(Recipe.of(RunConfig(model="mlp", dataset="own.module:data")))

    def why_different(*shape: int) -> str:
        counts = {"train": 1, "validation": 0, "test": 0}
        report = DataReport(counts, ("a", "b"), shape, "0" * 64, structure=("0" * 16,))
        return server.why_different(Joined(0, Absent(0), {"sfl": "0.2.0"}, report))

    assert why_different(3, 1024, 1024) == ""
    for side in range(MOST_BUILT):
        assert "it has 0 blocks instead of 6" in why_different(1, side + 1, 1)
    assert why_different(1, MOST_BUILT + 1, 1) == ""
    assert "it has 0 blocks" in why_different(1, 1, 1)
    strange = ServersModel(Recipe.of(RunConfig(model="lenet5", dataset="own.module:data")))
    server = strange  # which takes images alone: said when all are there
    assert why_different(5) == ""


class Sub(nn.Sequential):
    """A class of the model's own."""


def test_the_models_own_class_is_seen() -> None:
    assert difference(seen(nn.Sequential(nn.ReLU())), seen(Sub(nn.ReLU())), ["0"]) == (
        "its class differs"
    )


def test_what_differs_each_time_a_model_is_built_is_not_seen() -> None:
    one, other = (of_this_machine((1, 4, 4), 3) for _ in range(2))
    assert describe(one) != describe(other)
    again = [digests(describe(model), lambda: describe(of_this_machine((1, 4, 4), 3)))
             for model in (one, other)]  # fmt: skip
    assert again[0] == again[1]


@pytest.mark.slow
def test_the_structure_is_of_the_model_before_it_is_cut() -> None:
    """Cutting lets in-place modules next to the cut work on a copy: that is no other structure."""
    found = {
        SplitModel(Recipe.of(RunConfig(model="alexnet", cut=c)), (3, 64, 64), 10).structure
        for c in (2, 3)
    }
    assert len(found) == 1


def test_weights_of_any_type_have_a_checksum() -> None:
    state = {"a": torch.ones(3), "b": torch.tensor(7), "c": torch.ones(2, 2, dtype=torch.bfloat16)}
    before = weights_checksum(state)
    state["c"] = state["c"] * 2
    assert weights_checksum(state) != before
    assert weights_checksum({}) == "00000000"
