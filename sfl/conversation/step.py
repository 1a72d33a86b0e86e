"""Run a round's steps: one pair of client's and server's end for each ``Exchange``.

::

    client                                           server
    CUT: client_cut_steps, client_step               server_cut_steps, server_step
      TRAINING_LABELS    + labels                ->
      z = front(x)
      TRAINING_FEATURES  + activations z         ->  loss = task.loss(back(z), y)
                                                 <-  TRAINING_GRADS + gradients {loss, correct}
      z.backward(gradients); update the front        update the back
    WEIGHT_GRADS: client_gradient_steps              server_gradient_steps
      loss = task.loss(model(x), y)
      TRAINING_GRADS {loss, correct}             ->  average over the clients; update
                                                 <-  SEND_AGGREGATED_MODEL + the parameters
    NOTHING: client_local_steps                      server_local_steps
      every step without the server
      TRAINING_FIGURES   + loss, correct         ->
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, GRADS, LABELS, WEIGHT_GRADS
from sfl.archive.spool import Answer
from sfl.conversation.cut import Cut
from sfl.conversation.party import TRAIN, ClientParty, Party, ServerParty
from sfl.crash import crash_point
from sfl.data.client_data import batch_indices, batch_sizes, step_sizes
from sfl.files.checksum import File
from sfl.files.torch_file import decode, decode_state, encode, encode_state
from sfl.files.torch_reader import Buffer
from sfl.model.metrics import StepFigures, checked, checked_steps
from sfl.model.segment import Segment, train_step
from sfl.strategy.order import RoundPlan
from sfl.strategy.schemes import Exchange
from sfl.strategy.sync_sgd import GradientPool
from sfl.values import Position
from sfl.wire.driver import Conversation, Gate
from sfl.wire.messages import Message, MessageType


class Batch(NamedTuple):
    """The input of a step. x: (B, C, H, W) float32, y: (B,) int64."""

    at: Position
    x: Tensor
    y: Tensor


def _batches(party: ClientParty, round_index: int) -> Iterator[Batch]:
    """Yield the batches of a client's steps, each built on demand."""
    count = len(party.data.train)
    drawn = batch_indices(count, party.run, round_index=round_index, client=party.client)
    for step, indices in enumerate(drawn):
        party.link.at = at = party.at(round_index, step)
        yield Batch(at, *party.data.training_batch(indices, at))


def _sizes(party: ServerParty, round_index: int) -> Iterator[tuple[Position, int]]:
    """Yield the position and the number of samples of each of a client's steps."""
    count, run = party.num_samples[TRAIN], party.run
    epochs = (batch_sizes(count, run.batch_size) for _ in range(run.local_epochs))
    for step, size in enumerate(itertools.chain.from_iterable(epochs)):
        yield party.at(round_index, step), size


def client_cut_steps(party: ClientParty, round_index: int, num_steps: int) -> Conversation[None]:
    """Train the front for a round; faces ``server_cut_steps``."""
    batches = _batches(party, round_index)
    batch = next(batches, None)
    while batch is not None:
        batch = yield from client_step(party, batch, batches)


def server_cut_steps(party: ServerParty, plan: RoundPlan, round_index: int) -> Conversation[None]:
    """Train the back with one client for a round, waiting for its turn before each step."""
    turns = plan.steps[party.back_index]
    for at, size in _sizes(party, round_index):
        cut = Cut(party, at, size)
        if answer := plan.spool.get(at):
            yield from server_repeat_step(cut, answer, plan)
        else:
            if turns.in_order:
                yield turns.of(party.client)
            yield from server_step(party, cut, plan)


def client_step(
    party: ClientParty, batch: Batch, following: Iterator[Batch]
) -> Conversation[Batch | None]:
    """Train the front on one batch; faces ``server_step``. Return the next batch.

    It is built while the server computes.
    """
    front, clock, (at, x, y) = party.front, party.clock, batch
    cut = Cut(party, at, len(y))
    cut.send(LABELS, y)
    z = front.forward(x, at)
    clock.lap("forward")
    cut.send(ACTIVATIONS, z)
    next_batch = next(following, None)
    clock.lap("batch")
    grads, reply = yield from cut.receive(GRADS)
    front.backward(grads)
    party.check_step(front, at)
    clock.lap("backward")
    crash_point("front.before_update")
    front.update()
    crash_point("front.after_update")
    clock.lap("update")
    cut.record(order=at.step)
    party.watcher.step(at, _parse_figures(party, reply, len(y)))
    clock.lap("archive")
    return next_batch


def server_step(party: ServerParty, cut: Cut, plan: RoundPlan) -> Conversation[None]:
    """Train the back on one batch; faces ``client_step``.

    The gradients are sent before the back is updated. The step counts as done even if sending
    fails: a client that reconnects gets the stored answer, see ``server_repeat_step``.
    """
    back, clock, at = party.back, party.clock, cut.at
    y, _ = yield from cut.receive(LABELS)  # decoded while the client computes
    z, asked = yield from cut.receive(ACTIVATIONS)
    with party.measure_compute():
        figures, dz = _compute(party, back, (z, y), at)
        clock.lap("forward")
        assert dz is not None
        grads = cut.encode(GRADS, dz)
    answer = Answer(grads.data, _figures_content(party, figures), asked.checksum)
    crash_point("step.before_answer")
    try:
        cut.send_file(GRADS, grads, answer.content)
    finally:
        crash_point("step.after_answer")
        with party.measure_compute():
            back.update()
        crash_point("step.after_update")
        clock.lap("update")
        cut.record(plan.take(at.client))
        plan.spool.put(at, answer, recorded=party.archive.tensor_path(GRADS, at))
        plan.steps[party.back_index].done()
        party.watcher.step(at, figures)
        clock.lap("archive")


def server_repeat_step(cut: Cut, answer: Answer, plan: RoundPlan) -> Conversation[None]:
    """Send the stored answer of a step that is already done; faces ``client_step``."""
    yield from cut.receive_message(LABELS)
    asked = yield from cut.receive_message(ACTIVATIONS)
    if asked.checksum != answer.asked:
        plan.mismatched.add(cut.at.client)
    cut.send_file(GRADS, File(answer.data), answer.content)


def _compute(
    party: Party, last: Segment, batch: tuple[Tensor, Tensor], at: Position
) -> tuple[StepFigures, Tensor | None]:
    """Compute a step of the model's last segment; undo it on failure.

    Raises:
        StepFailed: it cannot be computed, or its results are not finite.
    """
    try:
        figures, dz = train_step(last, *batch, at)
        given = torch.tensor(figures.loss, device=last.device), *([] if dz is None else [dz])
        party.check_step(last, at, *given)
    except BaseException:
        last.undo_step()
        raise
    return figures, dz


def _parse_figures(party: Party, message: Message, size: int) -> StepFigures:
    """Return the peer's figures of a step over ``size`` samples, checked."""
    counts = [message.get(name, int) for name in party.task.counted]
    return StepFigures(*checked(message.get("loss", float), counts, size), size)


def _figures_content(party: Party, figures: StepFigures) -> dict[str, float]:
    return {"loss": figures.loss, **party.task.named_counts(figures.counts)}


def client_gradient_steps(
    party: ClientParty, round_index: int, num_steps: int
) -> Conversation[None]:
    """Send gradients of the whole model and load the updated weights, step by step.

    ``num_steps`` is that of the client with the most batches: a client without a batch left still
    loads the weights.
    """
    link, spec = party.link, party.split.parameters_spec
    batches = _batches(party, round_index)
    for step in range(num_steps):
        at = party.at(round_index, step)
        if batch := next(batches, None):
            x, y = batch.x, batch.y
            figures, _ = _compute(party, party.front, (x, y), at)
            grads, content = encode_state(party.front.gradients()), _figures_content(party, figures)
            link.send_file(MessageType.TRAINING_GRADS, grads, content=content, at=at)
            _record_gradients(party, at, len(y), grads)
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
    """Add a client's gradients to the pool, and send the updated weights, step by step."""
    link, pool = party.link, plan.pool
    assert pool is not None
    sizes = _sizes(party, round_index)
    for step in range(plan.num_steps_for(party.client)):
        at = party.at(round_index, step)
        if own := next(sizes, None):
            yield link
            message = link.receive_file(MessageType.TRAINING_GRADS, at=at)
            if step >= pool.num_given(party.client):  # else a repeated step, already in the pool
                with party.measure_compute():
                    figures = _add_gradients(party, pool, message, own[1])
                party.watcher.step(at, figures)
        # A client without a batch left sends nothing that would pace this loop.
        yield _both(pool.has_updated(step), link.has_sent)
        link.send_file(MessageType.SEND_AGGREGATED_MODEL, pool.answer(step), at=at)


def _add_gradients(
    party: ServerParty, pool: GradientPool, message: Message, num_samples: int
) -> StepFigures:
    """Check and record a client's gradients, and add them to the pool."""
    at, title = message.at, party.link.peer_title
    name = f"the gradients of {title}"
    grads = decode_state(message.payload, party.split.parameters_spec, name)
    party.check_finite(grads.values(), name, at)
    figures = _parse_figures(party, message, num_samples)
    party.check_loss(figures.loss, title, at)
    pool.add(party.client, grads, num_samples)
    if party.archive.records(at.round):
        _record_gradients(party, at, num_samples, encode_state(grads))
    return figures


def _record_gradients(party: Party, at: Position, num_samples: int, data: Buffer) -> None:
    """Record the gradients of the whole model, with the spec of their labels."""
    tensors = {WEIGHT_GRADS: (File(data), party.task.labels_spec(num_samples))}
    party.archive.record_step(tensors, at, order=at.step)


def _both(one: Gate, other: Gate) -> Gate:
    return lambda: one() and other()


def client_local_steps(party: ClientParty, round_index: int, num_steps: int) -> Conversation[None]:
    """Train the whole model for a round without the server; faces ``server_local_steps``."""
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
    """Receive and check the figures of a client's steps; faces ``client_local_steps``."""
    link = party.link
    yield link
    message = link.receive_file(MessageType.TRAINING_FIGURES, at=party.at(round_index))
    spec = party.task.steps_spec(plan.num_steps[party.client])
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
