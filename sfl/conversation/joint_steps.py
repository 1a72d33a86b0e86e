"""Steps that all clients take together, each with its part of the same samples: at the server.

Each client has its own conversation. The leader, who has the labels, takes the step; the others
contribute their activations, and wait for the reply::

    contributor's conversation      leader's conversation
    receive z_k; give it            receive labels and z; wait until all are given
                                    pack -> fusion, the server's segment, loss -> gradients, unpack
    send the gradients at z_k       send the gradients at z
"""

from collections.abc import Collection
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from sfl.model.fusion import Joint
from sfl.values import Position
from sfl.wire.driver import Conversation, Gate

E = TypeVar("E")


class Given(NamedTuple, Generic[E]):
    """What one client has sent in a step."""

    end: E  # the server's end of its cut
    z: Tensor


class JointSteps(Generic[E]):
    """What the clients have given in each step, and the steps' replies.

    A step is known by its phase (training, or the evaluated part) and its position, whichever the
    client. ``joint`` says what is joined; a client that the round goes on without counts as zeros.
    """

    def __init__(self, joint: Joint, leader: int) -> None:
        self.joint, self._leader = joint, leader
        self._present: set[int] = set(joint.samples)
        self._given: dict[tuple[str, Position], dict[int, Given[E]]] = {}
        self._replies: dict[tuple[str, Position], Any] = {}

    def start(self, present: Collection[int]) -> None:
        """Forget earlier steps; from now on these clients take part."""
        self._present, self._given, self._replies = set(present), {}, {}

    def forget_before(self, round_index: int) -> None:
        """Forget the steps of rounds before this one."""
        self._given = {key: g for key, g in self._given.items() if key[1].round >= round_index}
        self._replies = {key: r for key, r in self._replies.items() if key[1].round >= round_index}

    def has_done(self, phase: str, round_index: int) -> bool:
        """Return whether a step of a phase of a round has been done."""
        return any(name == phase and at.round == round_index for name, at in self._replies)

    def forget(self, phases: Collection[str], round_index: int) -> None:
        """Forget the replies of these phases of a round: its steps are taken again."""
        self._replies = {
            (phase, at): reply
            for (phase, at), reply in self._replies.items()
            if phase not in phases or at.round != round_index
        }

    def drop(self, client: int) -> None:
        """Go on without a client: in steps that it has not given to, zeros take its place."""
        self._present.discard(client)

    def of(self, phase: str, at: Position) -> "JointStep[E]":
        """Return one client's view of a step."""
        return JointStep(self, (phase, at._replace(client=self._leader)), at.client)


class JointStep(Generic[E]):
    """One client's view of a step of ``JointSteps``."""

    def __init__(self, steps: JointSteps[E], key: tuple[str, Position], client: int) -> None:
        self._steps, self._key, self._client = steps, key, client

    def give(self, end: E, z: Tensor, until: Gate) -> Conversation[None]:
        """Give this client's activations and wait at a gate; a lost client's are taken back.

        It gives them again when it is back, over another end.
        """
        given = self._steps._given.setdefault(self._key, {})
        given[self._client] = Given(end, z)
        try:
            yield until
        except GeneratorExit:
            given.pop(self._client, None)
            raise

    def all_given(self) -> bool:
        """Return whether all clients have given; a gate."""
        return self._steps._present <= self._steps._given.get(self._key, {}).keys()

    def give_and_take(self, end: E, z: Tensor) -> Conversation[dict[int, Given[E]]]:
        """Give activations, and return those of all clients when they are there."""
        yield from self.give(end, z, self.all_given)
        return dict(sorted(self._steps._given[self._key].items()))

    def finish(self, reply: Any) -> None:
        """Record the step's reply, and free what was given."""
        self._steps._replies[self._key] = reply
        self._steps._given.pop(self._key, None)

    def is_done(self) -> bool:
        """Return whether the step has a reply; a gate."""
        return self._key in self._steps._replies

    @property
    def reply(self) -> Any:
        return self._steps._replies[self._key]

    def contribute(self, end: E, z: Tensor) -> Conversation[Any]:
        """Give activations, and return the reply when it is there."""
        if not self.is_done():
            yield from self.give(end, z, self.is_done)
        return self.reply
