"""A round's steps, as pairs of ends that face each other: one pair for each ``Exchange``.

::

    client                                           server
    CUT: client_cut_steps, client_step               server_cut_steps, server_step
      z = front(x)
      TRAINING_LABELS    + labels                ->
      TRAINING_FEATURES  + activations z         ->  loss = task.loss(back(z), y)
                                                 <-  TRAINING_GRADS + gradients {loss, correct}
      z.backward(gradients); update the front        update the back
    WEIGHT_GRADS: client_gradient_steps              server_gradient_steps
      loss = task.loss(model(x), y)
      TRAINING_GRADS {loss, correct}             ->  average over the clients; update
                                                 <-  SEND_AGGREGATED_MODEL + the parameters
    NOTHING: client_local_steps                      server_local_steps
      every step alone
      TRAINING_FIGURES   + loss, correct         ->
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfl.archive.layout import GRADS
from sfl.archive.spool import Answer
from sfl.conversation.party import TRAIN, ClientParty, Party, ServerParty
from sfl.crash import crash_point
from sfl.data.client_data import batch_indices, batch_sizes, step_sizes
from sfl.errors import ProtocolError
from sfl.files.checksum import File
from sfl.files.torch_file import (
    decode,
    decode_file,
    decode_state,
    encode,
    encode_file,
    encode_state,
)
from sfl.model.metrics import StepFigures, checked, checked_steps
from sfl.model.segment import Segment, train_step
from sfl.strategy.order import RoundPlan
from sfl.strategy.schemes import Exchange
from sfl.values import Position
from sfl.wire.driver import Conversation, Gate
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType


class Batch(NamedTuple):
    """What a client takes a step on. x: (B, C, H, W) float32, y: (B,) int64."""

    at: Position
    x: Tensor
    y: Tensor


def _batches(party: ClientParty, round_index: int) -> Iterator[Batch]:
    """Yield the batches of a client's own steps, each made when it is asked for."""
    count = len(party.data.train)
    drawn = batch_indices(count, party.run, round_index=round_index, client=party.client)
    for step, indices in enumerate(drawn):
        party.link.at = at = party.at(round_index, step)
        yield Batch(at, *party.data.training_batch(indices, at))


def _sizes(party: ServerParty, round_index: int) -> Iterator[tuple[Position, int]]:
    """Yield where each of a client's own steps stands, and its number of samples."""
    count, run = party.num_samples[TRAIN], party.run
    epochs = (batch_sizes(count, run.batch_size) for _ in range(run.local_epochs))
    for step, size in enumerate(itertools.chain.from_iterable(epochs)):
        yield party.at(round_index, step), size


def client_cut_steps(party: ClientParty, round_index: int, num_steps: int) -> Conversation[None]:
    """Train the front through a round; faces ``server_cut_steps``."""
    batches = _batches(party, round_index)
    batch = next(batches, None)
    while batch is not None:
        batch = yield from client_step(party, batch, batches)


def server_cut_steps(party: ServerParty, plan: RoundPlan, round_index: int) -> Conversation[None]:
    """Train the back with one client through a round, at each step when it is its turn."""
    turns = plan.steps[party.back_index]
    for at, size in _sizes(party, round_index):
        if answer := plan.spool.get(party.client, at.step):
            yield from server_step_again(party, plan, answer, at)
        else:
            if turns.in_order:
                yield turns.of(party.client)
            yield from server_step(party, plan, size, at)


def client_step(
    party: ClientParty, batch: Batch, following: Iterator[Batch]
) -> Conversation[Batch | None]:
    """Train the front on one batch; faces ``server_step``. Return the batch that follows.

    That one is made while the server works.
    """
    link, clock, (at, x, y) = party.link, party.clock, batch
    size = len(y)
    labels = encode_file(y)
    clock.lap("serialise")
    _send_file(link, MessageType.TRAINING_LABELS, labels, at)
    clock.lap("send")
    z = party.front.forward(x, at)
    clock.lap("forward")
    features = encode_file(z)
    clock.lap("serialise")
    _send_file(link, MessageType.TRAINING_FEATURES, features, at)
    clock.lap("send")
    next_batch = next(following, None)
    clock.lap("batch")
    yield link
    reply = link.receive_file(MessageType.TRAINING_GRADS, at=at)
    clock.lap("wait")
    spec = party.split.features_spec(size)
    grads, stored = decode_file(reply.file, spec, f"TRAINING_GRADS of step {at.step}")
    party.check_finite([grads], f"the gradients of step {at.step}", at)
    clock.lap("load")
    party.front.backward(grads)
    party.check_step(party.front, at)
    clock.lap("backward")
    crash_point("front.before_update")
    party.front.update()
    crash_point("front.after_update")
    clock.lap("update")
    party.record(at, at.step, size, (labels, features, stored))
    party.watcher.step(at, _figures(party, reply, size))
    clock.lap("archive")
    return next_batch


def server_step(
    party: ServerParty, plan: RoundPlan, num_samples: int, at: Position
) -> Conversation[None]:
    """Train the back on one batch; faces ``client_step``.

    The gradients are on their way before the back's update. Once they are computed the step is
    taken, whether they arrive or not: a client that is lost asks again, ``server_step_again``.
    """
    link, back, turns = party.link, party.back, plan.steps[party.back_index]
    yield link
    labels, clock = link.receive_file(MessageType.TRAINING_LABELS, at=at).file, party.clock
    clock.start()
    y, labels = decode_labels(party, labels, num_samples)  # while the client computes
    clock.lap("load")
    yield link
    features = link.receive_file(MessageType.TRAINING_FEATURES, at=at).file
    started = time.perf_counter()
    clock.start()
    z, stored = decode_features(party, features, num_samples, at)
    clock.lap("load")
    figures, dz = _compute(party, back, (z, y), at)
    clock.lap("forward")
    assert dz is not None
    grads, content = encode_file(dz), _content(party, figures)
    clock.lap("serialise")
    crash_point("step.before_answer")
    try:
        _send_file(link, MessageType.TRAINING_GRADS, grads, at, content=content)
    finally:
        clock.lap("send")
        crash_point("step.after_answer")
        back.update()
        crash_point("step.after_update")
        clock.lap("update")
        party.compute_s += time.perf_counter() - started
        party.record(at, plan.take(at.client), num_samples, (labels, stored, grads))
        recorded = party.archive.place(GRADS, party.where(at))
        asked = features.checksum
        plan.spool.put(at.client, at.step, grads.data, content, asked=asked, recorded=recorded)
        turns.done()
        party.watcher.step(at, figures)
        clock.lap("archive")


def _compute(
    party: Party, last: Segment, batch: tuple[Tensor, Tensor], at: Position
) -> tuple[StepFigures, Tensor | None]:
    """Compute a step of the model's last segment, which stays as it was if it is refused.

    Raises:
        StepFailed: it cannot be computed, or what it gives is not finite.
    """
    try:
        figures, dz = train_step(last, *batch, at)
        given = torch.tensor(figures.loss, device=last.device), *([] if dz is None else [dz])
        party.check_step(last, at, *given)
    except BaseException:
        last.undo_step()
        raise
    return figures, dz


def server_step_again(
    party: ServerParty, plan: RoundPlan, answer: Answer, at: Position
) -> Conversation[None]:
    """Answer a step that has been taken as it was answered then; faces ``client_step``."""
    link = party.link
    yield link
    link.receive_file(MessageType.TRAINING_LABELS, at=at)
    yield link
    if link.receive_file(MessageType.TRAINING_FEATURES, at=at).checksum != answer.asked:
        plan.unlike.add(at.client)
    content = dict(answer.content)
    link.send_file(MessageType.TRAINING_GRADS, answer.data, content=content, at=at)


def _send_file(link: Link, message: MessageType, file: File, at: Position, **more: Any) -> None:
    link.send_file(message, file.data, at=at, checksum=file.checksum, **more)


def _figures(party: Party, message: Message, size: int) -> StepFigures:
    """Return what a peer says of a step over ``size`` samples."""
    counts = [message.get(name, int) for name in party.recipe.task.counted]
    return StepFigures(*checked(message.get("loss", float), counts, size), size)


def _content(party: Party, figures: StepFigures) -> dict[str, float]:
    return {"loss": figures.loss, **party.recipe.task.named_counts(figures.counts)}


def decode_labels(party: ServerParty, file: File, num_samples: int) -> tuple[Tensor, File]:
    """Return the labels of a batch, as the task has them, and their file as it may be stored."""
    name, task = f"the labels of client {party.client}", party.recipe.task
    y, stored = decode_file(file, task.labels_spec(num_samples), name)
    if wrong := task.wrong_labels(y, party.split.num_classes):
        raise ProtocolError(f"{name} {wrong}")
    return y, stored


def decode_features(
    party: ServerParty, file: File, num_samples: int, at: Position
) -> tuple[Tensor, File]:
    """Return the activations of a batch, and their file as it may be stored."""
    name = f"the activations of client {party.client}"
    z, stored = decode_file(file, party.split.features_spec(num_samples), name)
    party.check_finite([z], name, at)
    return z, stored


def client_gradient_steps(
    party: ClientParty, round_index: int, num_steps: int
) -> Conversation[None]:
    """Compute gradients of the whole model, and take over what the server makes of everyone's.

    A client that has no batch left takes over the weights all the same: ``num_steps`` counts those
    of the client that has most.
    """
    link, spec = party.link, party.split.parameters_spec
    batches = _batches(party, round_index)
    for step in range(num_steps):
        at = party.at(round_index, step)
        if batch := next(batches, None):
            x, y = batch.x, batch.y
            figures, _ = _compute(party, party.front, (x, y), at)
            grads, content = encode_state(party.front.gradients()), _content(party, figures)
            link.send_file(MessageType.TRAINING_GRADS, grads, content=content, at=at)
            party.record_gradients(at, len(y), grads)
            party.watcher.step(at, figures)
        party.clock.start()
        yield link
        reply = link.receive_file(MessageType.SEND_AGGREGATED_MODEL, at=at)
        party.clock.lap("wait")
        name = f"the weights after step {step}"
        weights = decode_state(reply.payload, spec, name)
        party.check_finite(weights.values(), name, at)
        party.front.load_parameters(weights)


def server_gradient_steps(
    party: ServerParty, plan: RoundPlan, round_index: int
) -> Conversation[None]:
    """Add a client's gradients to everyone's, and send what the update gave."""
    link, pool, spec = party.link, plan.pool, party.split.parameters_spec
    assert pool is not None
    sizes = _sizes(party, round_index)
    for step in range(plan.num_steps_for(party.client)):
        at = party.at(round_index, step)
        if own := next(sizes, None):
            yield link
            message = link.receive_file(MessageType.TRAINING_GRADS, at=at)
            started = time.perf_counter()
            if step >= pool.num_given(party.client):  # else it redoes what is in the update already
                name = f"the gradients of {link.peer_title}"
                grads = decode_state(message.payload, spec, name)
                party.check_finite(grads.values(), name, at)
                figures = _figures(party, message, own[1])
                party.check_loss(figures.loss, link.peer_title, at)
                pool.add(party.client, grads, own[1])
                if party.archive.records(at.round):
                    party.record_gradients(at, own[1], encode_state(grads))
                party.watcher.step(at, figures)
            party.compute_s += time.perf_counter() - started
        yield _both(pool.has_updated(step), link.has_sent)  # who has no batch left does not ask
        link.send_file(MessageType.SEND_AGGREGATED_MODEL, pool.answer(step), at=at)


def _both(one: Gate, other: Gate) -> Gate:
    return lambda: one() and other()


def client_local_steps(party: ClientParty, round_index: int, num_steps: int) -> Conversation[None]:
    """Train the whole model through a round, alone; faces ``server_local_steps``."""
    rows = []
    for at, x, y in _batches(party, round_index):
        figures, _ = _compute(party, party.front, (x, y), at)
        party.front.update()
        party.watcher.step(at, figures)
        rows.append((figures.loss, *figures.counts))
    table = encode(torch.tensor(rows, dtype=torch.float64))
    party.link.send_file(MessageType.TRAINING_FIGURES, table, at=party.at(round_index))
    yield from ()


def server_local_steps(party: ServerParty, plan: RoundPlan, round_index: int) -> Conversation[None]:
    """Hear how a client's steps went; faces ``client_local_steps``."""
    link = party.link
    yield link
    message = link.receive_file(MessageType.TRAINING_FIGURES, at=party.at(round_index))
    spec = party.recipe.task.steps_spec(plan.num_steps[party.client])
    table = decode(message.payload, spec, f"the figures of {link.peer_title}", message.checksum)
    sizes = step_sizes(party.num_samples[TRAIN], party.run)
    steps = checked_steps(table, sizes)
    party.check_loss(table[:, 0], link.peer_title, party.at(round_index))
    party.watcher.steps(party.client, steps)


class Ends(NamedTuple):
    """Both ends of a round's steps."""

    client: Callable[[ClientParty, int, int], Conversation[None]]
    server: Callable[[ServerParty, RoundPlan, int], Conversation[None]]


STEPS: dict[Exchange, Ends] = {
    Exchange.CUT: Ends(client_cut_steps, server_cut_steps),
    Exchange.WEIGHT_GRADS: Ends(client_gradient_steps, server_gradient_steps),
    Exchange.NOTHING: Ends(client_local_steps, server_local_steps),
}
