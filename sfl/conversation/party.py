"""What each side of a conversation has in hand while a run goes on."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sfl.archive.profile import Profile, Stopwatch
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.data.client_data import ClientData
from sfl.errors import NotFinite, StepFailed
from sfl.files.finite_check import LOG, check_finite
from sfl.model.metrics import StepFigures
from sfl.model.segment import Segment
from sfl.model.task import Task
from sfl.model.topology import Segments, States
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
        """Take note of all steps of a client's round, as ``checked_steps`` gives them."""


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
    compute_s: float = 0.0  # this side's work for the client; the server counts it by round
    warned_round: int = -1  # the round in which people were last told of NaN or infinity

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    @property
    def task(self) -> Task:
        return self.recipe.task

    def check_finite(self, tensors: Iterable[Tensor], name: str, at: Position) -> None:
        """See that what the peer sent is finite, or warn, once a round.

        Within one process nobody means harm, and a run that diverges may go on.

        Raises:
            NotFinite: it is not, and the run refuses that.
        """

        def warn(line: str) -> None:
            if self.warned_round != at.round:
                self.watcher.say(f"{line} in round {at.round + 1}")
                self.warned_round = at.round

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

    def end_wait(self) -> None:
        """Count what has passed as waiting for the peer."""
        self.clock.lap("wait")

    @contextmanager
    def measure_compute(self) -> Iterator[None]:
        """Count what is computed inside as work for this client."""
        started = time.perf_counter()
        yield
        self.compute_s += time.perf_counter() - started


@dataclass(kw_only=True)
class ClientParty(Party):
    """A client's side."""

    segments: Segments  # that it holds
    data: ClientData
    on_round: Callable[[int, Mapping[str, float]], None]  # round and its figures of this client
    # Told which round it begins with, and of which round's beginning to take its own things.
    on_start: Callable[[int, int], None] = lambda round_index, own: None

    @property
    def front(self) -> Segment:
        """Its first segment; where there is no cut, the whole model."""
        return self.segments.first

    def count_batch(self, round_index: int) -> None:
        """Count a batch of an evaluation as a step: heartbeats name it, and nothing else does."""
        now = self.link.at
        step = now.step + 1 if now.round == round_index else 0
        self.link.at = self.at(round_index, step)


@dataclass(frozen=True)
class RoundResult:
    """What the server learned of one client in a round."""

    states: States  # its weights; none where they do not travel to this server
    seconds: Mapping[str, float]  # what the client says that it spent on its steps


@dataclass(kw_only=True)
class ServerParty(Party):
    """The server's side, for one client."""

    watcher: ServerWatcher
    backs: Mapping[int, Segments]  # all copies of the server's segments; none if there are none
    num_samples: Mapping[str, int]  # of "train", "validation" and "test"
    # What the client at the other end has, since it connected: what this round starts from, and
    # what its own training made of this one. A client that is back has neither.
    ready_for_round: int = -1
    trained_round: int = -1
    own_round: int = 0  # of which round's beginning the client's own things are

    @property
    def back_index(self) -> int:
        """Which copy of the back takes this client's steps."""
        return self.recipe.scheme.back_of(self.client)

    @property
    def back(self) -> Segment:
        """The last of the segments that take this client's steps."""
        return self.backs[self.back_index].last

    def end_wait(self) -> None:
        """Count no waiting: the server computes for other clients meanwhile."""
        self.clock.start()
