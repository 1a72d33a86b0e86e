"""The state of each side of a conversation during a run."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sfl.archive.profile import Profile, Stopwatch
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.conversation.joint_steps import JointSteps
from sfl.data.client_data import ClientData
from sfl.data.vertical import Ids
from sfl.errors import NotFinite, StepFailed
from sfl.model.finite_check import LOG, check_finite
from sfl.model.metrics import StepFigures, checked
from sfl.model.segment import Segment
from sfl.model.task import Task
from sfl.model.topology import Holder, Route, Segments, States, holds_last, is_onward, route
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.weights.exchange import WeightStore
from sfl.wire.link import Link
from sfl.wire.messages import Message

TRAIN, VALIDATION, TEST = "train", "validation", "test"  # the parts of a client's data
TRAINING, EVALUATION = "training", "evaluation"  # the phases of a client's round
PREFIXES = {VALIDATION: "val", TEST: "test"}  # of an evaluated part's metrics


class Watcher(Protocol):
    """Receives training progress, for progress bars and logs."""

    def step(self, at: Position, figures: StepFigures) -> None: ...

    def start_round(self, round_index: int, num_steps: int) -> None: ...

    def say(self, line: str) -> None: ...


class ClientWatcher(Watcher, Protocol):
    """Receives one client's progress."""

    def untold_step(self, at: Position) -> None:
        """Take note of a step whose figures are not told this client."""


class ServerWatcher(Watcher, Protocol):
    """Receives the progress of all clients."""

    def steps(self, client: int, table: Tensor) -> None:
        """Log all steps of a client's round, as ``checked_steps`` returns them."""

    def predicted(self, client: int, labels: Tensor, outputs: Tensor) -> None:
        """Take labels and outputs of a client's test set, if the server has both."""


@dataclass(kw_only=True)
class Party:
    """State that each party of the chain has for one client.

    ``link``: to the server, or to the next hop before it; at server and hop, to the client, or to
    the hop before this one. ``onward``: of a hop, to the server or the hop behind this one.
    """

    holder: Holder
    client: int
    recipe: Recipe
    link: Link
    onward: Link | None = None
    others: Sequence[Any] = ()  # of a client: its sides at the servers of further tasks
    weights: WeightStore
    split: SplitModel
    archive: ArchiveWriter
    watcher: Watcher
    profile: Profile
    clock: Stopwatch = field(default_factory=Stopwatch)
    joint_steps: JointSteps[Any] | None = None  # at the server, where all take steps together
    compute_s: float = 0.0  # this side's computing for the client; the server resets it each round
    warned_round: int = -1  # the last round with a warning about NaN or infinity

    @property
    def run(self) -> RunConfig:
        return self.recipe.run

    @property
    def task(self) -> Task:
        return self.recipe.task

    @property
    def own_segments(self) -> Segments:
        """The segments that this side computes with for the client."""
        raise NotImplementedError

    @functools.cached_property
    def route(self) -> Route:
        """This side's segments on the way through the model."""
        return route(self.recipe.segments, self.holder)

    def link_at(self, cut: int) -> Link:
        """Return the link to the party on the other side of a cut."""
        leads_on = self.onward and is_onward(self.recipe.segments, self.holder, cut)
        return self.onward if self.onward and leads_on else self.link

    @property
    def leads(self) -> bool:
        """Whether this client's steps are its own, or it leads those of all; it has labels."""
        return self.recipe.has_labels(self.client)

    @property
    def joins(self) -> bool:
        """Whether this side joins the activations of all clients."""
        return self.recipe.joins_at(self.holder)

    @property
    def sends_labels(self) -> bool:
        """Whether this client's labels are sent."""
        return self.recipe.shares_labels and self.leads

    @property
    def computes_loss(self) -> bool:
        """Whether this side holds the model's last segment, and so computes the loss."""
        return holds_last(self.route)

    def check_finite(self, tensors: Iterable[Tensor], name: str, at: Position) -> None:
        """Check that the peer's tensors are finite; warn at most once a round.

        In a simulation there is no untrusted peer: a diverging run only logs a warning.

        Raises:
            NotFinite: they are not, and the run's policy is to reject them.
        """

        def warn(line: str) -> None:
            if self.warned_round != at.round:
                self.watcher.say(f"{line} in round {at.round + 1}")
                self.warned_round = at.round

        policy = LOG if self.link.in_process else self.run.on_nonfinite
        check_finite(tensors, name, policy, warn)

    def carried(self, message: Message) -> Any:
        """Return what goes on with our gradients of what has come with the peer's."""
        return {}

    def told_figures(self, message: Message, size: int) -> StepFigures | None:
        """Return the peer's figures of a step over ``size`` samples, checked."""
        counts = [message.get(name, int) for name in self.task.counted]
        return StepFigures(*checked(message.get("loss", float), counts, size), size)

    def check_state(self, state: Mapping[str, Tensor], name: str, at: Position) -> None:
        """Apply ``check_finite`` to weights."""
        self.check_finite(self.split.changing(state), name, at)

    def check_loss(self, losses: float | Tensor, of_what: str, at: Position) -> None:
        """Apply ``check_finite`` to a loss, or losses (N,), that a peer reports or causes."""
        self.check_finite([torch.as_tensor(losses)], f"the losses of {of_what}", at)

    def check_step(self, segment: Segment, at: Position, *computed: Tensor) -> None:
        """Apply ``check_finite`` to a step's results before the segment is updated.

        Checked are the segment's gradients and buffers, and ``computed``.

        Raises:
            StepFailed: they are not finite, and the run's policy is to reject them.
        """
        given = (*computed, *segment.gradients_in_place(), *segment.statistics())
        name = f"the results of step {at.step} of client {at.client}"
        try:
            self.check_finite(given, name, at)
        except NotFinite as error:
            raise StepFailed(str(error)) from error

    def at(self, round_index: int, step: int = -1) -> Position:
        """Return this client's position in the run."""
        return Position(self.run.run, round_index, step, self.client)

    def end_wait(self) -> None:
        """Count the time since the last lap as waiting for the peer."""
        self.clock.lap("wait")

    @contextmanager
    def measure_compute(self) -> Iterator[None]:
        """Add the time of the ``with`` block to ``compute_s``."""
        started = time.perf_counter()
        yield
        self.compute_s += time.perf_counter() - started


@dataclass(kw_only=True)
class ClientParty(Party):
    """A client's side."""

    holder: Holder = Holder.CLIENT
    watcher: ClientWatcher
    segments: Segments  # the client's
    data: ClientData  # with the labels of this server's task
    shares_figures: bool = False  # of each class, though its labels stay here
    on_round: Callable[[int, Mapping[str, float]], None]  # given a round and this client's metrics
    # Given the first round to run, and the round whose start its own state is to be loaded from.
    # Own state exists at this client only: an optimiser's state, a front that is not shared.
    on_start: Callable[[int, int], None] = lambda round_index, own: None

    def told_figures(self, message: Message, size: int) -> StepFigures | None:
        is_told = self.recipe.is_told_figures(self.client)
        return super().told_figures(message, size) if is_told else None

    @property
    def own_segments(self) -> Segments:
        return self.segments

    @property
    def at_each_server(self) -> "Sequence[ClientParty]":
        """This client's sides at all servers, the main one's first."""
        return self, *self.others

    def at_server(self, recipe: Recipe, link: Link, data: ClientData) -> "ClientParty":
        """Return this client's side at the server of a further task."""
        return replace(self, recipe=recipe, link=link, data=data, others=())

    @property
    def front(self) -> Segment:
        """The client's first segment; without a cut, the whole model."""
        return self.segments.first

    def count_batch(self, round_index: int) -> None:
        """Count an evaluation batch as a step, so that heartbeats show progress."""
        now = self.link.at
        step = now.step + 1 if now.round == round_index else 0
        self.link.at = self.at(round_index, step)


@dataclass(frozen=True)
class RoundResult:
    """What the server received of one client in a round."""

    states: States  # the client's weights; empty if they are not sent to this server
    seconds: Mapping[str, float]  # the client's own times of its steps, by ``TIMES``


@dataclass(kw_only=True)
class ServerParty(Party):
    """The side of the server, or of a hop, for one client."""

    holder: Holder = Holder.SERVER
    watcher: ServerWatcher
    backs: Mapping[int, Segments]  # copies of the server's segments; empty if clients train alone
    num_samples: Mapping[str, int]  # of "train", "validation" and "test"
    order: Ids | None = None  # the samples that all clients have, where they are aligned
    # Over the current connection; a client that reconnects starts at -1 again.
    ready_for_round: int = -1  # the round whose starting weights the client holds
    trained_round: int = -1  # the last round that the client has trained
    spans: dict[str, float] = field(default_factory=dict)  # start and end of the round's phases
    _round_began: float = 0.0  # by time.perf_counter
    own_round: int = 0  # the round whose start the client's own state belongs to

    def start_round(self, began: float) -> None:
        """Begin to measure a round that began at this time of ``time.perf_counter``."""
        self.spans, self._round_began = {}, began

    @contextmanager
    def measure_span(self, phase: str) -> Iterator[None]:
        """Note start and end of the ``with`` block, in seconds since the round began.

        A phase that is repeated lasts from its first start to its last end.
        """
        self.spans.setdefault(f"{phase}_start_s", time.perf_counter() - self._round_began)
        yield
        self.spans[f"{phase}_end_s"] = time.perf_counter() - self._round_began

    @property
    def back_index(self) -> int:
        """The index of the back's copy that takes this client's steps."""
        return self.recipe.scheme.back_of(self.client)

    def carried(self, message: Message) -> Any:
        return message.content if self.onward else {}

    def told_figures(self, message: Message, size: int) -> StepFigures | None:
        if self.onward:  # they are sealed for the other end of the chain
            return None
        figures = super().told_figures(message, size)
        assert figures is not None
        self.check_loss(figures.loss, self.link.peer_title, message.at)
        return figures

    @property
    def own_segments(self) -> Segments:
        return self.backs[self.back_index]

    def end_wait(self) -> None:
        """Do not count waiting: the server computes for other clients meanwhile."""
        self.clock.start()
