"""All cuts of the model for one batch: this side's ends, and what happens where several meet.

Where clients take their steps together, the leader's end joins their activations (``JoinedCut``);
where several servers stand behind a cut, a client's end goes to all of them (``FannedCut``).
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from sfl.archive.layout import GRADS, LABELS
from sfl.conversation.cut import EVALUATION, TRAINING, Cut
from sfl.conversation.joint_steps import JointStep
from sfl.conversation.party import TRAIN, Party
from sfl.conversation.passes import Sent
from sfl.errors import RunError, SflError
from sfl.files.checksum import File
from sfl.model.fusion import Joint
from sfl.model.topology import Relay, first_link, stops
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message
from sfl.wire.passing import pass_on


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


class FannedCut(Cut):
    """A client's end of the cut behind which several servers stand, each with a task of its own.

    Activations go to all servers. Their gradients are added up, the last server's first: the order
    in which autograd adds up those of a tensor that is used several times.
    """

    def __init__(self, *arguments: Any, others: Sequence[Cut]) -> None:
        super().__init__(*arguments)
        self._others = others
        for index, end in enumerate(others, 1):
            end.filed_at = self.at._replace(link=index)

    @property
    def ends(self) -> Collection[Cut]:
        return [self, *self._others]

    def send_file(self, kind: str, file: File, content: Any = "") -> None:
        super().send_file(kind, file, content)
        for end in self._others if kind != LABELS else ():  # each server has labels of its own
            end._files[kind] = file
            end.send_file(kind, file, content)

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]:
        total: Tensor | None = None
        for end in reversed(self._others):
            tensor, _ = yield from end.receive(kind)
            total = tensor if total is None else total + tensor
        tensor, message = yield from super().receive(kind)
        return (tensor if total is None else total + tensor), message


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
        elif self._party.others and self._phase == TRAIN:
            ends = [Cut(side, at, self.num_samples) for side in self._party.others]
            self[link] = FannedCut(self._party, at, self.num_samples, others=ends)
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

    def send_labels(self, labels: Sequence[Tensor]) -> None:
        """Send each server the labels of its task."""
        for end, y in zip(self.first.ends, labels, strict=True):
            end.send(LABELS, y)

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
            self._party.archive.record_step(end.tensors, end.filed_at, order)
