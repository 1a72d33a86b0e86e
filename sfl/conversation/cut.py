"""Send, receive, check and record a batch's tensors at a cut, in training and in use.

::

    sender: Cut.send                                 receiver: Cut.receive
      tensor -> file                             ->  file -> tensor, checked
    Cuts.record: files to the archive                Cuts.record: files to the archive

Extension points: a defence changes the tensor at the start of ``encode``; a codec replaces
``encode_file`` there and ``decode_file`` in ``receive``. Neither exists yet.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS, LABELS
from sfl.archive.profile import Stopwatch
from sfl.conversation.joint_steps import JointStep
from sfl.conversation.party import TRAIN, Party
from sfl.conversation.passes import Sent
from sfl.errors import ProtocolError, RunError, SflError
from sfl.files.checksum import File
from sfl.files.torch_file import TensorSpec, decode_file, encode_file
from sfl.model.fusion import Joint
from sfl.model.task import Task
from sfl.model.topology import Holder, Relay, Route, Segments, first_link, route, stops
from sfl.model.transfer import host_memory, to_host
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link, kind_of
from sfl.wire.messages import Message, MessageType
from sfl.wire.passing import pass_on

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
        self.at = at
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


class JoinedCut(Cut):
    """The leader's end of the cut at which the activations of all clients are joined.

    What it receives is packed from all clients' activations; packed gradients are taken apart, and
    each client is sent its part: by its own conversation, see ``JointSteps``.
    """

    def __init__(self, *arguments: Any, step: JointStep[Cut]) -> None:
        super().__init__(*arguments)
        self._step = step
        self._ends: dict[int, Cut] = {}

    @property
    def ends(self) -> Collection[Cut]:
        return self._ends.values() or [self]

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]:
        tensor, message = yield from super().receive(kind)
        if kind == LABELS:
            return tensor, message
        taken = yield from self._step.give_and_take(self, tensor)
        self._ends = {k: given.end for k, given in taken.items()}
        return self._joint.pack({k: given.z for k, given in taken.items()}, len(tensor)), message

    @property
    def _joint(self) -> Joint:
        assert self._party.split.joint is not None
        return self._party.split.joint

    def encode(self, kind: str, tensor: Tensor) -> File:
        for client, part in self._joint.unpack(tensor).items():
            if client in self._ends:
                Cut.encode(self._ends[client], kind, part.contiguous())
        return self._files[kind]

    def send_file(self, kind: str, file: File, content: Any = "") -> None:
        # What a hop passes on is sealed for the leader alone.
        theirs = {} if self._party.onward else content
        for end in self._ends.values():
            end.sent = Sent(self.at.link, kind, end._files[kind], theirs)
        super().send_file(kind, file, content)


class Cuts(dict[int, Cut]):
    """One end of each cut of the model, for one batch, made when it is asked for."""

    def __init__(
        self,
        party: Party,
        at: Position,
        num_samples: int,
        phase: str = TRAIN,
    ) -> None:
        """``phase``: training, or the evaluated part of the data."""
        self._party, self._phase = party, phase
        self._messages = TRAINING if phase == TRAIN else EVALUATION
        self.at, self.num_samples = at, num_samples

    def __missing__(self, link: int) -> Cut:
        at, step = self.at._replace(link=link), self.joint_step
        if step and self._party.leads and self._party.joins and link == self._first_link:
            self[link] = JoinedCut(self._party, at, self.num_samples, self._messages, step=step)
        else:
            self[link] = Cut(self._party, at, self.num_samples, self._messages)
        return self[link]

    @property
    def joint_step(self) -> JointStep[Cut] | None:
        """The step that all clients take together, if they do; at the server."""
        steps = self._party.joint_steps
        return steps.of(self._phase, self.at) if steps else None

    @contextlib.contextmanager
    def blaming_nobody(self, error_type: type[SflError]) -> Iterator[None]:
        """Let an error of a step of all clients end the run: none is known to be at fault.

        Raises:
            RunError: it has failed.
        """
        try:
            yield
        except error_type as error:
            if self.joint_step is None:
                raise
            raise RunError(f"step {self.at.step} of all clients fails: {error}") from error

    def ends(self) -> Iterator[Cut]:
        """Yield the ends of all cuts, and those of other clients that take the step together."""
        for link in sorted(self):
            yield from self[link].ends

    @property
    def _first_link(self) -> int:
        return first_link(self._party.recipe.segments)

    @property
    def first(self) -> Cut:
        """The first cut between two parties, at which labels travel."""
        return self[self._first_link]

    @property
    def own_first(self) -> Cut:
        """The cut at which a server's or hop's first segment takes its input."""
        taken = (stop.takes for stop in stops(self._party.route) if stop.takes is not None)
        return self[next(taken)]

    def receive_labels(self) -> Conversation[tuple[Tensor, Message] | None]:
        """Receive the labels where this side computes the loss; else pass them on: None."""
        if self._party.computes_loss:
            return (yield from self.first.receive(LABELS))
        yield from self.pass_labels_on()
        return None

    def pass_labels_on(self) -> Conversation[None]:
        """Pass the labels on to the party that computes the loss, unread."""
        yield from self.pass_on(LABELS, Relay(self._first_link, is_onward=True))

    def pass_on(self, kind: str, relay: Relay) -> Conversation[None]:
        """Pass a tensor between two other parties on, unread."""
        party = self._party
        assert party.onward is not None
        ends = party.link, party.onward
        source, target = ends if relay.is_onward == (kind != GRADS) else reversed(ends)
        at = self.at._replace(link=relay.link)
        yield from pass_on(source, target, self._messages[kind], at=at)

    def record(self, order: int) -> None:
        """Hand the step's tensors to the archive; ``order`` counts the back's earlier steps."""
        for end in self.ends():
            self._party.archive.record_step(end.tensors, end.at, order)


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
