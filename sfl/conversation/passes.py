"""A party's pass through its segments of the model, in training and evaluation, and in replay.

From the row of the topology (``sfl.model.topology.route``) each party takes its part: what comes
from another party is received at a cut, what another party needs is sent there. So client, server
and replay run this text, whatever the topology::

    training:    forward in order; the loss at the last segment; backward in reverse order
    evaluation:  forward in order; the figures at the last segment
    inference:   forward in order
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS
from sfl.archive.profile import Stopwatch
from sfl.files.checksum import File
from sfl.model.metrics import StepFigures, Tally
from sfl.model.segment import Segment, begin_step, tally_of
from sfl.model.task import Task
from sfl.model.topology import Relay, Route, Segments, stops
from sfl.model.transfer import Fetch
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message


class Computing(Protocol):
    """A party with its segments on the way through the model."""

    @property
    def route(self) -> Route: ...

    @property
    def own_segments(self) -> Segments: ...

    def measure_compute(self) -> AbstractContextManager[None]: ...


class Side(Computing, Protocol):
    """A party of the run, for one client's batch."""

    clock: Stopwatch

    @property
    def task(self) -> Task: ...

    def told_figures(self, message: Message, size: int) -> StepFigures | None:
        """Return the figures that come with the first gradients; None where they cannot be read.

        Raises:
            ProtocolError: they are missing, or impossible for so many samples.
        """

    def carried(self, message: Message) -> Any:
        """Return what goes on with our gradients of what has come with the peer's."""

    def check_step(self, segment: Segment, at: Position, *computed: Tensor) -> None:
        """Check that a step's results are finite.

        Raises:
            StepFailed: they are not.
        """


class End(Protocol):
    """This side's end of a cut, for one batch."""

    def receive(self, kind: str) -> Conversation[tuple[Tensor, Message]]: ...

    def encode(self, kind: str, tensor: Tensor) -> File: ...

    def send_file(self, kind: str, file: File, content: Any = "") -> None: ...


class Ends(Protocol):
    """This side's ends of all cuts."""

    at: Position
    num_samples: int

    def __getitem__(self, link: int) -> End: ...

    def pass_on(self, kind: str, relay: Relay) -> Conversation[None]:
        """Pass a tensor between two other parties on, unread."""


class Sent(NamedTuple):
    """A tensor that is sent at a cut."""

    link: int
    kind: str
    file: File
    content: Any


def _go_on() -> Conversation[None]:
    yield from ()


def train_pass(
    party: Side,
    cuts: Ends,
    x: Tensor | None,
    y: Tensor | None,
    meanwhile: Callable[[], object] = lambda: None,
    begin: Callable[[], Conversation[None]] = _go_on,
) -> Conversation[tuple[StepFigures | None, Sent | None]]:
    """Compute a party's part of a step: forward through its segments, and backward.

    ``x``, ``y``: samples and labels, where the party has them. ``meanwhile`` is called before each
    wait; ``begin`` runs before the first computation. Return the step's figures, None where another
    party has computed them and told us none, and the gradients in front of the first segment, which
    the caller sends. On failure all segments are as before.

    Raises:
        StepFailed: the step cannot be computed, or its results are not finite.
        ProtocolError, IntegrityError, NotFinite: as ``Cut.receive``; for the peer's figures.
    """
    try:
        z = yield from _forward(party, cuts, x, meanwhile, begin)
        return (yield from _backward(party, cuts, z, y, meanwhile))
    except BaseException:
        party.own_segments.undo_step()
        raise


def _forward(
    party: Side,
    cuts: Ends,
    x: Tensor | None,
    meanwhile: Callable[[], object],
    begin: Callable[[], Conversation[None]],
) -> Conversation[Tensor]:
    """Return the output of the party's last segment, or the input of the model's last one."""
    z, first = x, stops(party.route)[0]
    for stop in party.route:
        if isinstance(stop, Relay):
            yield from cuts.pass_on(ACTIVATIONS, stop)
            continue
        if stop.takes is not None:
            meanwhile()
            z, _ = yield from cuts[stop.takes].receive(ACTIVATIONS)
        if stop is first:
            yield from begin()
        assert z is not None
        if not stop.is_last:
            with party.measure_compute():
                z = party.own_segments[stop.segment].forward(z, cuts.at)
            party.clock.lap("forward")
        if stop.gives is not None:
            cut = cuts[stop.gives]
            cut.send_file(ACTIVATIONS, cut.encode(ACTIVATIONS, z))
    assert z is not None
    return z


def _backward(
    party: Side, cuts: Ends, z: Tensor, y: Tensor | None, meanwhile: Callable[[], object]
) -> Conversation[tuple[StepFigures | None, Sent | None]]:
    """Return as ``train_pass``. ``z``: see ``_forward``."""
    grads: Tensor | None = None
    figures: StepFigures | None = None
    last: Sent | None = None
    content: Any = {}  # goes with the next gradients: figures, with the first behind the loss
    for stop in reversed(party.route):
        if last:
            cuts[last.link].send_file(*last[1:])
            last = None
        if isinstance(stop, Relay):
            yield from cuts.pass_on(GRADS, stop)
            continue
        if stop.gives is not None:
            meanwhile()
            grads, reply = yield from cuts[stop.gives].receive(GRADS)
            figures = figures or party.told_figures(reply, cuts.num_samples)
            content = party.carried(reply)
        segment = party.own_segments[stop.segment]
        with party.measure_compute():
            if stop.is_last:
                assert y is not None
                figures, grads = compute(party, segment, (z, y), cuts.at)
                content = figures_content(party, figures)
            else:
                assert grads is not None
                grads = segment.backward(grads)
                fetch = Fetch([] if grads is None else [grads])
                party.check_step(segment, cuts.at, *fetch.given)
                grads = next(iter(fetch.wait()), None)
            party.clock.lap("forward" if stop.is_last else "backward")
            if stop.takes is not None:
                assert grads is not None
                file = cuts[stop.takes].encode(GRADS, grads)
                last, content = Sent(stop.takes, GRADS, file, content), {}
    return figures, last


def compute(
    party: Side, last: Segment, batch: tuple[Tensor, Tensor], at: Position
) -> tuple[StepFigures, Tensor | None]:
    """Compute a step of the model's last segment; undo it on failure.

    Raises:
        StepFailed: it cannot be computed, or its results are not finite.
    """
    try:
        step = begin_step(last, *batch, at)
        party.check_step(last, at, *step.computed)
        return step.results()
    except BaseException:
        last.undo_step()
        raise


def figures_content(party: Side, figures: StepFigures) -> dict[str, float]:
    return {"loss": figures.loss, **party.task.named_counts(figures.counts)}


def evaluation_pass(
    party: Side, cuts: Ends, x: Tensor | None, y: Tensor | None
) -> Conversation[tuple[Tally, Tensor] | None]:
    """Compute a party's part of a batch's evaluation; return tally and outputs of the last segment.

    ``x``, ``y``: samples and labels, where the party has them.
    """
    outputs = yield from outputs_pass(party, cuts, x)
    if outputs is None:
        return None
    assert y is not None
    with party.measure_compute():
        return tally_of(party.own_segments.last, outputs, y)


def outputs_pass(party: Computing, cuts: Ends, x: Tensor | None) -> Conversation[Tensor | None]:
    """Compute a party's part of a forward pass in evaluation.

    ``x``: the samples, where the party has them. Return the model's outputs: (B, *output), on the
    device of the last segment; None where another party computes them.
    """
    z = x
    for stop in party.route:
        if isinstance(stop, Relay):
            yield from cuts.pass_on(ACTIVATIONS, stop)
            continue
        if stop.takes is not None:
            z, _ = yield from cuts[stop.takes].receive(ACTIVATIONS)
        assert z is not None
        with party.measure_compute():
            z = party.own_segments[stop.segment].evaluate(z)
        if stop.is_last:
            return z
        if stop.gives is not None:
            cut = cuts[stop.gives]
            cut.send_file(ACTIVATIONS, cut.encode(ACTIVATIONS, z))
    return None
