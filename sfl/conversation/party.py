"""What each side of a conversation has in hand while a run goes on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS, LABELS, WEIGHT_GRADS
from sfl.archive.profile import Profile, Stopwatch
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.data.client_data import ClientData
from sfl.errors import NotFinite, StepFailed
from sfl.files.checksum import File
from sfl.files.finite import LOG, check_finite
from sfl.files.torch_file import TensorSpec
from sfl.files.torch_reader import Buffer
from sfl.model.metrics import StepFigures
from sfl.model.segment import Segment
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.weights.exchange import WeightStore
from sfl.wire.link import Link

TRAIN, VALIDATION, TEST = "train", "validation", "test"  # the parts of a client's data
PREFIXES = {VALIDATION: "val", TEST: "test"}  # of the metrics of each evaluated part


class Watcher(Protocol):
    """Who hears how the training gets on: progress bars and logs."""

    def step(self, at: Position, figures: StepFigures) -> None: ...

    def say(self, line: str) -> None: ...


class ServerWatcher(Watcher, Protocol):
    """Who hears of all clients' steps."""

    def steps(self, client: int, table: Tensor) -> None:
        """Take note of all steps of a client's round: (steps, 3) float64, as ``checked_steps``."""


@dataclass(kw_only=True)
class Party:
    """What client and server both have for one client."""

    client: int
    recipe: Recipe
    link: Link
    weights: WeightStore
    split: SplitModel
    archive: ArchiveWriter
    watcher: Watcher
    profile: Profile
    clock: Stopwatch = field(default_factory=Stopwatch)
    warned_in: int = -1  # the round in which people were last told of NaN or infinity

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    def check_finite(self, tensors: Iterable[Tensor], name: str, at: Position) -> None:
        """See that what the peer sent is finite, or warn, once a round.

        Within one process nobody means harm, and a run that diverges may go on.

        Raises:
            NotFinite: it is not, and the run refuses that.
        """

        def warn(line: str) -> None:
            if self.warned_in != at.round:
                self.watcher.say(f"{line} in round {at.round + 1}")
                self.warned_in = at.round

        policy = LOG if self.link.in_process else self.run.on_nonfinite
        check_finite(tensors, name, policy, warn)

    def check_state(self, state: Mapping[str, Tensor], name: str, at: Position) -> None:
        """Do as ``check_finite``, for weights."""
        self.check_finite(self.split.changing(state), name, at)

    def check_loss(self, losses: float | Tensor, of_what: str, at: Position) -> None:
        """Do as ``check_finite``, for a loss, or several: (N,), that a peer tells or makes."""
        self.check_finite([torch.as_tensor(losses)], f"the losses of {of_what}", at)

    def check_step(self, segment: Segment, at: Position, *computed: Tensor) -> None:
        """See before its update that all that a step gave a segment is finite, or warn.

        ``computed``: what it gave beside gradients and buffers.

        Raises:
            StepFailed: it is not, and the run refuses that.
        """
        given = (*computed, *segment.gradients_in_place(), *segment.statistics())
        name = f"the results of step {at.step} of client {at.client}"
        try:
            self.check_finite(given, name, at)
        except NotFinite as error:
            raise StepFailed(str(error)) from error

    def at(self, round_index: int, step: int = -1) -> Position:
        """Return a position of this client's in the run."""
        return Position(self.run.run, round_index, step, self.client)

    def parts(self, round_index: int) -> tuple[str, ...]:
        """Return what is evaluated after a round."""
        last = round_index == self.run.rounds - 1
        return (VALIDATION, TEST) if last else (VALIDATION,)

    def record(
        self, at: Position, order: int, num_samples: int, files: tuple[File, File, File]
    ) -> None:
        """Hand the labels, activations and gradients of a step to the archive."""
        if not self.archive.records(at.round):
            return
        cut = self.split.features_spec(num_samples)
        specs = {LABELS: self.split.labels_spec(num_samples), ACTIVATIONS: cut, GRADS: cut}
        of_kinds = zip(specs.items(), files, strict=True)
        self._record({kind: (file, spec) for (kind, spec), file in of_kinds}, at, order)

    def record_gradients(self, at: Position, num_samples: int, data: Buffer) -> None:
        """Hand the gradients of the whole model, of a batch of so many samples, to the archive."""
        shape = self.split.labels_spec(num_samples)  # what they were computed from
        self._record({WEIGHT_GRADS: (File(data), shape)}, at, at.step)

    def where(self, at: Position) -> dict[str, int]:
        """Return what identifies a step in the archive."""
        return {"client": at.client, "round": at.round, "step": at.step}

    def _record(
        self, tensors: Mapping[str, tuple[File, TensorSpec]], at: Position, order: int
    ) -> None:
        self.archive.record_step(tensors, self.where(at) | {"order": order})


@dataclass(kw_only=True)
class ClientParty(Party):
    """A client's side."""

    front: Segment
    data: ClientData
    on_round: Callable[[int, Mapping[str, float]], None]  # round and its figures of this client
    # Told which round it begins with, and of which round's beginning to take its own things.
    on_start: Callable[[int, int], None] = lambda round_index, own: None

    def count_batch(self, round_index: int) -> None:
        """Count a batch of an evaluation as a step: heartbeats name it, and nothing else does."""
        now = self.link.at
        step = now.step + 1 if now.round == round_index else 0
        self.link.at = self.at(round_index, step)


@dataclass(frozen=True)
class RoundResult:
    """What the server learned of one client in a round."""

    front: dict[str, Tensor]  # its client-side weights; empty where they never travel
    file: bytes  # of them
    seconds: Mapping[str, float]  # what the client says that it spent on its steps


@dataclass(kw_only=True)
class ServerParty(Party):
    """The server's side, for one client."""

    watcher: ServerWatcher
    backs: Mapping[int, Segment]  # all copies of the server's model; none if there is none
    num_samples: Mapping[str, int]  # of "train", "validation" and "test"
    # What the client at the other end has, since it connected: what this round starts from, and
    # what its own training made of this one. A client that is back has neither.
    at_start_of: int = -1
    has_trained: int = -1
    own_round: int = 0  # of which round's beginning the client's own things are
    compute_s: float = 0.0  # the server's arithmetic for this client, since the round's start

    @property
    def back_index(self) -> int:
        """Which copy of the back takes this client's steps."""
        return self.recipe.scheme.back_of(self.client)

    @property
    def back(self) -> Segment:
        return self.backs[self.back_index]
