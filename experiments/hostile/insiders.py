"""What somebody who is a client of a run may do to its server, or to a hop, over real sockets.

``insiders`` has each by what is wrong with it; ``try_insider`` tries one.
"""

import contextlib
import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.hostile.files import hostile_files, saved
from experiments.hostile.target import Target, heard, link_over
from sfl.conversation.join import Welcome, client_join
from sfl.conversation.report import DataReport, send_report
from sfl.conversation.round import SECONDS_WIDTH
from sfl.environment import FINGERPRINT
from sfl.errors import ConnectionLost, LetGo, SflError
from sfl.files.checksum import checksum, crc32
from sfl.files.torch_file import encode, encode_state
from sfl.model.topology import passing_links
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.stream import Stream
from sfl.transport.tokens import SERVER, client_authenticate
from sfl.values import Position
from sfl.weights.exchange import client_weights
from sfl.wire.driver import run_blocking
from sfl.wire.framing import HEAD, encode_head, pack_head
from sfl.wire.link import CLIENT, Peer
from sfl.wire.messages import Limits, Message, MessageType
from sfl.wire.seal import About, SealKey

SHAPE, NUM_CLASSES, BATCH = (1, 28, 28), 10, 4
# Of every insider: behind a hop, the server may hear that one has gone when the next is there.
INSTANCE = "0" * 32


def write_bystander(folder: Path) -> Path:
    """Write the data of an honest client of the same run: a server of a client that would fail
    again, and of no other, ends.
    """
    folder.mkdir()
    labels = np.arange(5 * NUM_CLASSES) % NUM_CLASSES
    classes = np.array([str(k) for k in range(NUM_CLASSES)])
    np.savez(
        folder / "own.npz", x=np.zeros((len(labels), *SHAPE[1:]), "u1"), y=labels, classes=classes
    )
    return folder


@dataclass(frozen=True)
class Claim:
    """What a client says that it has."""

    train: int = 2 * BATCH
    validation: int = BATCH
    test: int = BATCH
    num_classes: int = NUM_CLASSES
    shape: tuple[int, ...] = SHAPE
    class_counts: tuple[int, ...] = ()

    @property
    def report(self) -> DataReport:
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        classes = tuple(map(str, range(self.num_classes)))
        return DataReport(counts, classes, self.shape, "0" * 64, self.class_counts)


class Insider:
    """Somebody who is a client of a run with ``partition own``, and means harm."""

    def __init__(self, stream: Stream, client: int = 0, claim: Claim | None = None) -> None:
        self.link, self.client = link_over(stream), client
        self.link.peer_name, self.link.on_notice = "server", lambda line: None
        self.welcome = self._join(claim or Claim())
        self.run = self.welcome.run.run

    def _join(self, claim: Claim) -> Welcome:
        fingerprint = dict.fromkeys(FINGERPRINT, "x")
        joining = client_join(
            self.link, self.client, fingerprint, instance=INSTANCE, heartbeat_s=10.0
        )
        welcome = run_blocking(joining)
        recipe = Recipe.of(welcome.run)
        built = SplitModel(recipe, SHAPE, claim.num_classes).structure
        report = dataclasses.replace(claim.report, structure=built, weights="0" * 8)
        if (passing := passing_links(recipe.segments)) is None:
            send_report(self.link, report)
            return welcome
        key, about = SealKey(), About(welcome.run.run, self.client, is_client=True, passing=passing)
        send_report(self.link, report, key.public)
        self.link.seal = key.agree(welcome.seal, about)
        return welcome

    def at(self, step: int = -1, round_index: int = 0) -> Position:
        return Position(self.run, round_index, step, self.client)

    def begin(self) -> None:
        """Do all that comes before the first step."""
        link = self.link
        link.receive_message_as_json(MessageType.GO_ON)
        self.decline_weights()
        link.receive_message_as_json(MessageType.START_TRAINING)

    def decline_weights(self) -> None:
        """Say of the weights that are offered that we have them."""
        offer = self.link.receive_message_as_json(MessageType.REQUEST_TO_SEND_FILE)
        has_it = {"offset": offer.get("bytes", int)}
        self.link.send_message_as_json(MessageType.SEND_FILE, content=has_it, at=offer.at)

    def train(self) -> None:
        """Take part in the round's steps as one should."""
        link = self.link
        link.limits = Limits(payload_bytes={MessageType.TRAINING_GRADS: 2**20})
        for step in range(2):
            self.send(
                MessageType.TRAINING_LABELS, encode(torch.zeros(BATCH, dtype=torch.int64)), step
            )
            self.send(MessageType.TRAINING_FEATURES, encode(torch.zeros(BATCH, 128)), step)
            link.receive_file(MessageType.TRAINING_GRADS)
        spent = dict.fromkeys(("compute_s", "wait_s", "transfer_s"), f"{0:0{SECONDS_WIDTH}.6f}")
        link.send_message_as_json(MessageType.ROUND_TRAINED, content=spent, at=self.at())

    def send(
        self, kind: MessageType, data: bytes, step: int = 0, *, link: int = 0, content: object = ""
    ) -> None:
        at = self.at(step)._replace(link=link)
        self.link.send_file(kind, data, at=at, content=content)

    def announce(self, kind: MessageType, num_bytes: int) -> None:
        """Say that a file of so many bytes follows."""
        text = encode_head(Message(kind, at=self.at(0), payload=b"x"))[HEAD.size :]
        head = pack_head(len(text), num_bytes, crc=crc32(text))
        self.link._stream.send([memoryview(head + text)])

    def upload(self, data: bytes, num_bytes: int | None = None) -> None:
        """Offer weights of so many bytes, and send them."""
        size = len(data) if num_bytes is None else num_bytes
        offer = {"name": client_weights(0), "bytes": size, "checksum": checksum(data)}
        at = self.at()
        self.link.send_message_as_json(MessageType.REQUEST_TO_SEND_FILE, content=offer, at=at)
        self.link.receive_message_as_json(MessageType.SEND_FILE)
        self.link.send_file(MessageType.SEND_MODEL, data, at=at)


LABELS, FEATURES = MessageType.TRAINING_LABELS, MessageType.TRAINING_FEATURES
Harm = Callable[[Insider], None]


def _tensors() -> dict[str, Any]:
    z = torch.zeros(BATCH, 128)
    bad = z.clone()
    bad[1, 2] = float("nan")
    huge = z.clone()
    huge[0, 0] = 3e38
    infinite = z.clone()
    infinite[3, 4] = -float("inf")
    return {
        "NaN": bad, "infinity": infinite, "3e38": huge, "a dtype too wide": z.double(),
        "a sample too many": torch.zeros(BATCH + 1, 128), "a transposed shape": z.t().contiguous(),
    }  # fmt: skip


def _labels() -> dict[str, Any]:
    return {
        "labels out of range": torch.tensor([0, 1, 2, NUM_CLASSES]),
        "labels below 0": torch.tensor([0, 1, 2, -1]),
        "labels that are no integers": torch.zeros(BATCH),
        "labels of another shape": torch.zeros(BATCH, 1, dtype=torch.int64),
    }


def _as_labels(data: bytes) -> Harm:
    activations = encode(torch.zeros(BATCH, 128))

    def harm(insider: Insider) -> None:
        insider.send(LABELS, data)
        insider.send(FEATURES, activations)

    return harm


def _as_activations(data: bytes) -> Harm:
    labels = encode(torch.zeros(BATCH, dtype=torch.int64))

    def harm(insider: Insider) -> None:
        insider.send(LABELS, labels)
        insider.send(FEATURES, data)

    return harm


def _as_model(data: bytes, num_bytes: int | None = None) -> Harm:
    def harm(insider: Insider) -> None:
        insider.train()
        insider.upload(data, num_bytes)

    return harm


def _says(kind: MessageType) -> Harm:
    return lambda insider: insider.link.send_message_as_json(kind, at=insider.at())


def _model_of(value: float) -> Harm:
    """Send the right weights, but for some of this value."""

    def harm(insider: Insider) -> None:
        front = SplitModel(Recipe.of(insider.welcome.run), SHAPE, NUM_CLASSES).front_state()
        name = next(iter(front))
        front[name] = torch.full_like(front[name], value)
        _as_model(encode_state(front))(insider)

    return harm


def _damaged(insider: Insider) -> None:
    wrong = "crc32:00000000"
    message = Message(LABELS, at=insider.at(0), payload=b"x" * 100, checksum=wrong)
    insider.link._stream.send([memoryview(encode_head(message) + b"y" * 100)])


def insiders() -> dict[str, Harm]:
    """Return what a client of a run may send at its first step, by what is wrong with it."""
    found: dict[str, Harm] = {}
    for name, (data, _) in hostile_files().items():
        if data:  # a file of nothing is no frame
            found[f"activations: {name}"] = _as_activations(data)
            found[f"labels: {name}"] = _as_labels(data)
    found |= {f"activations: {name}": _as_activations(saved(t)) for name, t in _tensors().items()}
    found |= {name: _as_labels(saved(t)) for name, t in _labels().items()}
    found |= {
        "a file of 4 GiB announced": lambda insider: insider.announce(FEATURES, 2**32),
        "a file of 1 GB announced": lambda insider: insider.announce(LABELS, 10**9),
        "a file damaged on the way": _damaged,
        "activations before labels": lambda insider: insider.send(FEATURES, b"x"),
        "a step that is not its turn": lambda insider: insider.send(LABELS, b"x", step=7),
        "a round that is not its turn": _says(MessageType.ROUND_TRAINED),
        "a model that was not offered": lambda insider: insider.send(MessageType.SEND_MODEL, b"x"),
        "REGISTER again": _says(MessageType.REGISTER),
        "a server's message": _says(MessageType.TRAINING_DONE),
    }
    # The last, since the steps that come before them count.
    for name in (
        "a pickle that runs code", "a deflate bomb", "nested tuples as a key", "a view", "a dict",
        "a pickle in front",
    ):  # fmt: skip
        found[f"model: {name}"] = _as_model(hostile_files()[name][0])
    found |= {"model: NaN": _model_of(float("nan")), "model: 3e38": _model_of(3e38)}
    return found | {
        "a model larger than the model": _as_model(bytes(4_000_000)),
        "a model of 2^62 bytes offered": _as_model(b"x", 2**62),
    }


TIMES = 200  # that a client takes its own place over


def takes_its_own_place(target: Target) -> str:
    """Register again and again as the same process, with a new connection each time."""
    fingerprint = dict.fromkeys(FINGERPRINT, "x")
    instance, given = secrets.token_hex(16), 0
    client = (target.tokens.only_client or 0) if target.tokens else 0
    with contextlib.ExitStack() as stack:
        for _ in range(TIMES):
            link = link_over(stack.enter_context(target.reach()))
            joining = client_join(link, client, fingerprint, instance=instance, heartbeat_s=10.0)
            with contextlib.suppress(LetGo, ConnectionLost):
                if target.tokens:
                    peer = Peer(CLIENT, client)
                    run_blocking(client_authenticate(link, target.tokens, peer, listener=SERVER))
                run_blocking(joining)
                given += 1
    return f"the place was given {given} times of {TIMES}"


def try_insider(target: Target, harm: Harm) -> str:
    """Join a run as its client, do one thing, and return what the server says."""
    with target.reach() as stream:
        insider = Insider(stream)
        insider.begin()
        with contextlib.suppress(SflError):  # what it hears then is told below
            harm(insider)
        return heard(insider.link)
