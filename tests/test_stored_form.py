"""What a peer wrote lies in a run's folder as we would have written it, whoever reads it how."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.hostile.files import EVIL, changed
from experiments.hostile.insiders import BATCH, NUM_CLASSES, SHAPE, Insider
from experiments.hostile.target import Target
from sfl.errors import PeerFailed
from sfl.files.checksum import File, checksum
from sfl.files.torch_file import TensorSpec, decode_file, encode, encode_state
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.wire.messages import Limits, MessageType
from tests.support.launch import Launcher, wait_for

Y, Z = torch.arange(BATCH), torch.ones(BATCH, 128)
OWN = ["--model", "mlp", "--partition", "own", "--batch-size", 4, "--clients", 1, "--run", "r"]


def as_another_writes(file: bytes) -> bytes:
    """Return a file of the same tensors that our own writer would not have written."""
    other = changed({}, file)
    assert other != file
    return other


def test_only_our_own_form_is_taken_over_as_it_came() -> None:
    for tensor in (Z, Y, torch.tensor([True, False]), torch.zeros(0, 3)):
        for data in (encode(tensor), as_another_writes(encode(tensor))):
            file = File(data, checksum(data))
            read, stored = decode_file(file, TensorSpec.of(tensor), "z")
            assert torch.equal(read, tensor)
            assert stored.data == encode(tensor)
            assert stored.checksum == checksum(stored.data)


@pytest.fixture
def insider(launcher: Launcher, request: pytest.FixtureRequest) -> Iterator[Insider]:
    """A client at its first step of a run that a real server serves; the server is then stopped."""
    server = launcher.server(*OWN, "--rounds", 1, *request.param)
    wait_for(server, "listening")
    with Target("127.0.0.1", launcher.port).reach() as stream:
        insider = Insider(stream)
        insider.begin()
        yield insider


def stop(launcher: Launcher) -> Path:
    """Stop the server, which writes what waits to be written; return the first step's folder."""
    (server,) = launcher.programs
    assert server.process.pid is not None
    os.kill(server.process.pid, signal.SIGTERM)
    server.ended_with(3)
    return launcher.folder / "server/r/client_files/client_0/round_000"


@pytest.mark.parametrize("insider", [[]], indirect=True)
def test_what_another_torch_writes_is_recorded_as_ours(
    insider: Insider, launcher: Launcher
) -> None:
    insider.link.limits = Limits(payload_bytes={MessageType.TRAINING_GRADS: 2**20})
    insider.send(MessageType.TRAINING_LABELS, as_another_writes(encode(Y)))
    insider.send(MessageType.TRAINING_FEATURES, as_another_writes(encode(Z)))
    insider.link.receive_file(MessageType.TRAINING_GRADS)
    (server,) = launcher.programs
    while not list(launcher.folder.rglob("grads_0_0.pt")):  # recorded behind the answer
        server.process.join(0.02)
        assert server.process.is_alive(), server.err
    folder = stop(launcher)
    assert (folder / "labels_0_0.pt").read_bytes() == encode(Y)
    assert (folder / "split_layer_tensor_0_0.pt").read_bytes() == encode(Z)


@pytest.mark.parametrize("insider", [["--scheme", "sync-sgd"]], indirect=True)
def test_gradients_of_another_torch_are_recorded_as_ours(
    insider: Insider, launcher: Launcher
) -> None:
    split = SplitModel(Recipe.of(insider.welcome.run), SHAPE, NUM_CLASSES)
    grads = {n: torch.ones(s.shape, dtype=s.dtype) for n, s in split.parameters_spec.items()}
    insider.link.limits = Limits(payload_bytes={MessageType.SEND_AGGREGATED_MODEL: 2**20})
    data, said = as_another_writes(encode_state(grads)), {"loss": 1.0, "correct": 1}
    at = insider.at(0)
    insider.link.send_file(MessageType.TRAINING_GRADS, data, content=said, at=at)
    insider.link.receive_file(MessageType.SEND_AGGREGATED_MODEL)
    assert (stop(launcher) / "weight_grads_0_0.pt").read_bytes() == encode_state(grads)


@pytest.mark.parametrize("insider", [[]], indirect=True)
def test_a_pickle_in_front_of_the_right_labels_is_refused(
    insider: Insider, launcher: Launcher
) -> None:
    insider.send(MessageType.TRAINING_LABELS, EVIL + encode(Y))
    with pytest.raises(PeerFailed, match="the labels of client 0: has bytes before its record"):
        insider.link.receive_file(MessageType.TRAINING_GRADS)
    wait_for(launcher.programs[0], "has bytes before its record")
    assert not list(stop(launcher).parent.rglob("*.pt"))


U_SHAPED = [["--cut", "3,5"]]


@pytest.mark.parametrize("insider", U_SHAPED, indirect=True)
@pytest.mark.parametrize(
    ("gradients", "content", "why"),
    [
        (torch.ones(BATCH, 64), "", "lacks 'correct'"),
        (torch.ones(BATCH, 64), {"loss": -1.0, "correct": 0}, "-1 is no loss"),
        (torch.ones(BATCH, 64), {"loss": 1.0, "correct": BATCH + 1}, "counts no samples"),
        (torch.ones(BATCH, 65), {"loss": 1.0, "correct": 0}, r"holds float32 \[4, 65\]"),
        (torch.full((BATCH, 64), torch.nan), {"loss": 1.0, "correct": 0}, "NaN or infinity"),
    ],
)
def test_what_a_client_says_of_its_loss_is_checked(
    insider: Insider, launcher: Launcher, gradients: torch.Tensor, content: object, why: str
) -> None:
    """It alone is refused, and the server's step is undone."""
    insider.link.limits = Limits(payload_bytes={MessageType.TRAINING_FEATURES: 2**20})
    insider.send(MessageType.TRAINING_FEATURES, encode(Z))
    reply = insider.link.receive_file(MessageType.TRAINING_FEATURES)
    assert reply.at.link == 1
    insider.send(MessageType.TRAINING_GRADS, encode(gradients), link=1, content=content)
    with pytest.raises(PeerFailed, match=why):
        insider.link.receive_file(MessageType.TRAINING_GRADS)
    wait_for(launcher.programs[0], "client_0 is refused")
