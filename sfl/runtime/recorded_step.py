"""The server's side of a recorded step, for ``sfl.conversation.passes`` to compute it again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from sfl.archive.profile import Stopwatch
from sfl.archive.reader import Step
from sfl.errors import IntegrityError
from sfl.files.checksum import File
from sfl.model.fusion import Joint
from sfl.model.segment import Segment
from sfl.model.topology import Relay, Segments, holds_last, route, stops
from sfl.runtime.recorded_run import RecordedRun
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message, MessageType


class RecordedServer:
    """The server of a recorded run, for a pass through its segments."""

    def __init__(self, recorded: RecordedRun, segments: Segments) -> None:
        self.task, self.own_segments = recorded.recipe.task, segments
        self.route = stops(route(recorded.recipe.segments, recorded.holder))
        self.clock = Stopwatch()

    @property
    def computes_loss(self) -> bool:
        return holds_last(self.route)

    def measure_compute(self) -> AbstractContextManager[None]:
        return nullcontext()

    def told_figures(self, message: Message, size: int) -> None:
        """The client's figures are not recorded with its gradients."""

    def carried(self, message: Message) -> Any:
        return {}

    def check_step(self, segment: Segment, at: Position, *computed: Tensor) -> None:
        """Accept all results: they are compared with the recorded ones."""


class RecordedEnds:
    """What a server received and sent in a step, at each cut.

    What was received is received again; ``compare`` is given what was sent as it is computed now.
    """

    def __init__(
        self,
        at: Position,
        steps: Sequence[Step],
        compare: Callable[[Step, str, Tensor], None],
        joint: Joint | None = None,
    ) -> None:
        """``steps``: at each cut; of all clients, if they are ``joint`` at the first."""
        self.at, self._steps, self.compare, self._joint = at, steps, compare, joint
        self.num_samples = steps[0].num_samples

    def __getitem__(self, link: int) -> "_RecordedEnd":
        at_cut = {step.client: step for step in self._steps if step.link == link}
        if not at_cut:
            folder = self._steps[0].folder
            raise IntegrityError(
                f"{folder}: step {self.at.step} has nothing recorded at cut {link}"
            )
        return _RecordedEnd(self, at_cut, None if link else self._joint)

    def pass_on(self, kind: str, relay: Relay) -> Conversation[None]:
        raise AssertionError("what is passed on is not recorded")


class _RecordedEnd:
    """A step's tensors at one cut."""

    def __init__(self, ends: RecordedEnds, steps: Mapping[int, Step], joint: Joint | None) -> None:
        self._ends, self._steps, self._joint = ends, steps, joint

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]:
        yield from ()
        received = {client: step.tensor(kind) for client, step in self._steps.items()}
        if self._joint:
            tensor = self._joint.pack(received, self._ends.num_samples)
        else:
            (tensor,) = received.values()
        return tensor, Message(MessageType.MESSAGE, "", "", "", self._ends.at)

    def encode(self, kind: str, tensor: Tensor) -> File:
        joint, steps = self._joint, self._steps
        parts = joint.unpack(tensor) if joint else dict.fromkeys(steps, tensor)
        for client, step in steps.items():
            self._ends.compare(step, kind, parts[client])
        return File(b"")

    def send_file(self, kind: str, file: File, content: Any = "") -> None: ...
