"""Send, receive, check and record a batch's tensors at a cut, in training and in use.

::

    sender: Cut.send                                 receiver: Cut.receive
      tensor -> file                             ->  file -> tensor, checked
    Cuts.record: files to the archive                Cuts.record: files to the archive

Extension points: a defence changes the tensor at the start of ``encode``; a codec replaces
``encode_file`` there and ``decode_file`` in ``receive``. Neither exists yet.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS, LABELS
from sfl.archive.profile import Stopwatch
from sfl.conversation.passes import Sent
from sfl.errors import ProtocolError
from sfl.files.checksum import File
from sfl.files.torch_file import TensorSpec, decode_file, encode_file
from sfl.model.task import Task
from sfl.model.topology import Holder, Relay, Route, Segments, route
from sfl.model.transfer import host_memory, to_host
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link, kind_of
from sfl.wire.messages import Message, MessageType

TRAINING = {
    LABELS: MessageType.TRAINING_LABELS,
    ACTIVATIONS: MessageType.TRAINING_FEATURES,
    GRADS: MessageType.TRAINING_GRADS,
}
EVALUATION = {
    LABELS: MessageType.VALIDATION_LABELS,
    ACTIVATIONS: MessageType.VALIDATION_FEATURES,
}
OUTPUTS = "outputs"  # of the model, sent back where its last segment's input came from
INFERENCE = {
    ACTIVATIONS: MessageType.INFERENCE_FEATURES,
    OUTPUTS: MessageType.INFERENCE_OUTPUTS,
}
_KIND_NAMES = {
    LABELS: "labels", ACTIVATIONS: "activations", GRADS: "gradients", OUTPUTS: "outputs"
}  # fmt: skip


class Side(Protocol):
    """What a cut needs of the party whose end it is."""

    @property
    def onward(self) -> Link | None: ...

    def link_at(self, cut: int) -> Link:
        """Return the link to the party on the other side of a cut."""

    @property
    def split(self) -> SplitModel: ...

    @property
    def task(self) -> Task: ...

    @property
    def clock(self) -> Stopwatch: ...

    @property
    def own_segments(self) -> Segments: ...

    def measure_compute(self) -> AbstractContextManager[None]: ...

    def check_finite(self, tensors: Iterable[Tensor], name: str, at: Position) -> None: ...

    def end_wait(self) -> None: ...


class Cut:
    """One end of a cut, for one batch. Tensors are named by their kind in the archive.

    Labels are the task's; activations and their gradients: (B, *cut) float32.
    """

    def __init__(
        self,
        party: Side,
        at: Position,
        num_samples: int,
        messages: Mapping[str, MessageType] = TRAINING,
    ) -> None:
        """``at``: the step; its ``link`` is the cut."""
        self._party, self._messages = party, messages
        self.at = self.filed_at = at  # on the wire, and in the archive
        split, task = party.split, party.task
        z = split.features_spec(num_samples, at.link)
        self._specs = {
            LABELS: task.labels_spec(num_samples),
            ACTIVATIONS: z,
            GRADS: z,
            OUTPUTS: task.outputs_spec(num_samples, split.num_classes),
        }
        self._files: dict[str, File] = {}  # sent and received tensors, to be recorded
        self.sent: Sent | None = None  # activations or gradients; a party sends one of them
        self.received = ""  # checksum of the others

    def send(self, kind: str, tensor: Tensor, content: Any = "") -> None:
        """Send a tensor, with an optional JSON value."""
        self.send_file(kind, self.encode(kind, tensor), content)

    def encode(self, kind: str, tensor: Tensor) -> File:
        """Encode a tensor as the file that is sent and recorded."""
        file = self._files[kind] = encode_file(to_host(tensor))
        self._party.clock.lap("serialise")
        return file

    def send_file(self, kind: str, file: File, content: Any = "") -> None:
        """Send an encoded tensor."""
        if kind != LABELS:
            self.sent = Sent(self.at.link, kind, file, content)
        self._party.link_at(self.at.link).send_file(
            self._messages[kind], file.data, content=content, at=self.at, checksum=file.checksum
        )
        self._party.clock.lap("send")

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]:
        """Receive a tensor; return it with its message.

        Raises:
            ProtocolError: it belongs to another step, or its labels are out of range.
            IntegrityError: the file holds no tensor of the expected shape and dtype.
            NotFinite: it holds NaN or infinity, and the run's policy is to reject them.
        """
        message = yield from self.receive_message(kind)
        client = f" of client {self.at.client}" if self.at.client >= 0 else ""
        name = f"the {_KIND_NAMES[kind]}{client}"
        with self._party.measure_compute():
            memory = host_memory(self._party.own_segments.first.device)
            tensor, file = decode_file(message.file, self._specs[kind], name, memory)
            self._check(kind, tensor, name)
        self._files[kind] = file
        self._party.clock.lap("load")
        return tensor, message

    def receive_message(self, kind: str) -> Conversation[Message]:
        """Receive a tensor's message without decoding it."""
        link = self._party.link_at(self.at.link)
        yield link
        message = link.receive_file(self._messages[kind], at=self.at)
        if kind != LABELS:
            self.received = message.checksum
        self._party.end_wait()
        return message

    @property
    def ends(self) -> "Collection[Cut]":
        """This end, and those of other clients that take the step together."""
        return [self]

    def _check(self, kind: str, tensor: Tensor, name: str) -> None:
        if kind != LABELS:
            self._party.check_finite([tensor], name, self.at)
            return
        if wrong := self._party.task.wrong_labels(tensor, self._party.split.num_classes):
            raise ProtocolError(f"{name} {wrong}")

    @property
    def tensors(self) -> dict[str, tuple[File, TensorSpec]]:
        """What was sent and received here, by kind."""
        return {kind: (file, self._specs[kind]) for kind, file in self._files.items()}


class Transfer(NamedTuple):
    """A tensor that a party sends, or receives, in a step."""

    sends: bool
    kind: str
    link: int


class Relayed(NamedTuple):
    """A tensor that a party passes on in a step."""

    kind: str
    relay: Relay


def transfers(route: Route) -> list[Transfer | Relayed]:
    """Return what a party sends, receives and passes on in a step, in order, without labels."""
    found: list[Transfer | Relayed] = []
    for way, kind in ((route, ACTIVATIONS), (tuple(reversed(route)), GRADS)):
        for stop in way:
            if isinstance(stop, Relay):
                found.append(Relayed(kind, stop))
                continue
            beside = [stop.takes, stop.gives] if kind == ACTIVATIONS else [stop.gives, stop.takes]
            found += [
                Transfer(sends, kind, link)
                for sends, link in zip((False, True), beside, strict=True)
                if link is not None
            ]
    return found


def own_transfers(route: Route) -> list[Transfer]:
    """Return what a party sends and receives in a step, in order, without labels."""
    return [transfer for transfer in transfers(route) if isinstance(transfer, Transfer)]


def kinds_by_link(segments: Mapping[str, Holder]) -> tuple[list[str], list[str]]:
    """Return the kinds of ``link.kind_of`` at further cuts, up to the server and down from it."""
    found = own_transfers(route(segments, Holder.SERVER))
    further = [(t.sends, kind_of(TRAINING[t.kind], t.link)) for t in found if t.link]
    return [kind for sends, kind in further if not sends], [k for sends, k in further if sends]
