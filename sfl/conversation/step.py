"""Run a round's steps: one pair of client's and server's end for each ``Exchange``.

::

    client                                           server
    CUT, with one cut: client_step                   server_step
      TRAINING_LABELS    + labels                ->
      z = front(x)
      TRAINING_FEATURES  + activations z         ->  loss = task.loss(back(z), y)
                                                 <-  TRAINING_GRADS + gradients {loss, correct}
      z.backward(gradients); update the front        update the back
    CUT, with two cuts: the same functions
      z = front(x)
      TRAINING_FEATURES  + activations z         ->  u = back(z)
      loss = task.loss(head(u), y)               <-  TRAINING_FEATURES + activations u
      TRAINING_GRADS + gradients {loss, correct} ->  u.backward(gradients)
      z.backward(gradients); update both         <-  TRAINING_GRADS + gradients; update the back
    WEIGHT_GRADS: client_gradient_steps              server_gradient_steps
      loss = task.loss(model(x), y)
      TRAINING_GRADS {loss, correct}             ->  average over the clients; update
                                                 <-  SEND_AGGREGATED_MODEL + the parameters
    NOTHING: client_local_steps                      server_local_steps
      every step without the server
      TRAINING_FIGURES   + loss, correct         ->
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, LABELS, WEIGHT_GRADS
from sfl.archive.spool import Answer
from sfl.conversation.cut import Relayed, transfers
from sfl.conversation.cuts import Cuts
from sfl.conversation.party import TRAIN, ClientParty, Party, ServerParty
from sfl.conversation.passes import compute, figures_content, train_pass
from sfl.crash import crash_point
from sfl.data.client_data import batch_indices, batch_sizes, step_sizes
from sfl.errors import StepFailed
from sfl.files.checksum import File
from sfl.files.torch_file import decode, decode_state, encode, encode_state
from sfl.files.torch_reader import Buffer
from sfl.model.metrics import StepFigures, checked_steps
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
    further: Sequence[Tensor]  # labels of further tasks, as y


def _batches(party: ClientParty, round_index: int) -> Iterator[Batch]:
    """Yield the batches of a client's steps, each built on demand."""
    count, drawn_as = len(party.data.train), party.recipe.leader(party.client)
    drawn = batch_indices(count, party.run, round_index=round_index, client=drawn_as)
    for step, indices in enumerate(drawn):
        party.link.at = at = party.at(round_index, step)
        further = [side.data.train.y[indices] for side in party.others]
        yield Batch(at, *party.data.training_batch(indices, at), further)


def _sizes(party: ServerParty, round_index: int) -> Iterator[tuple[Position, int]]:
    """Yield the position and the number of samples of each of a client's steps."""
    count, run = party.num_samples[TRAIN], party.run
    epochs = (batch_sizes(count, run.batch_size) for _ in range(run.local_epochs))
    for step, size in enumerate(itertools.chain.from_iterable(epochs)):
        yield party.at(round_index, step), size


def client_cut_steps(party: ClientParty, round_index: int, num_steps: int) -> Conversation[None]:
    """Train the client's segments for a round; faces ``server_cut_steps``."""
    batches = _batches(party, round_index)

    def make() -> Batch | None:
        batch = next(batches, None)
        party.clock.lap("batch")
        return batch

    batch = make()
    while batch is not None:
        make_next = functools.cache(make)  # once, at the step's first wait
        yield from client_step(party, batch, make_next)
        batch = make_next()


def server_cut_steps(party: ServerParty, plan: RoundPlan, round_index: int) -> Conversation[None]:
    """Train the server's segments with one client for a round, waiting for its turn each step."""
    turns = plan.steps[party.back_index]
    for at, size in _sizes(party, round_index):
        party.link.at, cuts = at, Cuts(party, at, size)
        if not (party.leads or party.joins):
            return  # a hop joins this client's activations to the leader's
        if plan.spool.has(cuts.own_first.at):
            yield from server_repeat_step(party, cuts, plan)
        elif not party.leads:
            yield from server_contribute(cuts)
        else:
            if turns.in_order:
                yield turns.of(party.client)
            with contextlib.ExitStack() as held:
                yield from server_step(party, cuts, plan, held)


def client_step(
    party: ClientParty, batch: Batch, meanwhile: Callable[[], object]
) -> Conversation[None]:
    """Train the client's segments on one batch; faces ``server_step``."""
    at, x, y, further = batch
    cuts, clock = Cuts(party, at, len(y)), party.clock
    if party.sends_labels:
        cuts.send_labels([y, *further])
    figures, _ = yield from train_pass(party, cuts, x, y, meanwhile)
    crash_point("front.before_update")
    party.own_segments.update_weights()
    crash_point("front.after_update")
    clock.lap("update")
    cuts.record(order=at.step)
    party.watcher.step(at, figures) if figures else party.watcher.untold_step(at)
    clock.lap("archive")


def server_step(
    party: ServerParty, cuts: Cuts, plan: RoundPlan, held: contextlib.ExitStack
) -> Conversation[None]:
    """Train the server's segments on one batch; faces ``client_step``.

    ``held`` keeps them from other clients from the first computation on.

    The last gradients are sent before the update. The step counts as done even if sending fails: a
    client that reconnects gets the stored answers, see ``server_repeat_step``.
    """
    clock, at, labels = party.clock, cuts.at, None
    turns = plan.steps[party.back_index]

    def begin() -> Conversation[None]:
        if not turns.is_of(party.client):
            yield turns.of(party.client)
        held.enter_context(turns.step(party.client))

    if party.sends_labels:
        labels = yield from cuts.receive_labels()  # decoded while the client computes
    y = labels[0] if labels else None
    with cuts.blaming_nobody(StepFailed):
        figures, last = yield from train_pass(party, cuts, None, y, begin=begin)
    assert last is not None
    crash_point("step.before_answer")
    try:
        cuts[last.link].send_file(*last[1:])
    finally:
        crash_point("step.after_answer")
        with party.measure_compute():
            party.own_segments.update_weights()
        crash_point("step.after_update")
        clock.lap("update")
        cuts.record(plan.take(at.client))
        _keep_answers(party, cuts, plan)
        if cuts.joint_step:
            cuts.joint_step.finish(figures)
        plan.steps[party.back_index].done()
        if figures is not None:  # a hop is told none
            party.watcher.step(at, figures)
        clock.lap("archive")


def _keep_answers(party: ServerParty, cuts: Cuts, plan: RoundPlan) -> None:
    """Keep what the step has sent, for a client that repeats it."""
    for cut in cuts.ends():
        if cut.sent:
            answer = Answer(cut.sent.file.data, cut.sent.content, cut.received)
            recorded = party.archive.tensor_path(cut.sent.kind, cut.at)
            plan.spool.put(cut.at, answer, recorded=recorded)


def server_contribute(cuts: Cuts) -> Conversation[None]:
    """Contribute a client's activations to a step that all clients take; faces ``client_step``."""
    end, step = cuts.first, cuts.joint_step
    assert step is not None
    z, _ = yield from end.receive(ACTIVATIONS)
    yield from step.contribute(end, z)
    assert end.sent is not None
    end.send_file(*end.sent[1:])


def server_repeat_step(party: ServerParty, cuts: Cuts, plan: RoundPlan) -> Conversation[None]:
    """Send the stored answers of a step that is already done; faces ``client_step``."""
    if party.sends_labels and party.computes_loss:
        yield from cuts.first.receive_message(LABELS)
    elif party.sends_labels:
        yield from cuts.pass_labels_on()
    due, first = transfers(party.route), cuts.own_first.at.link
    if not party.leads:  # the rest of the step is the leader's
        due = [t for t in due if not isinstance(t, Relayed) and t.link == first]
    sent = {t.link for t in due if not isinstance(t, Relayed) and t.sends}
    answers = {link: plan.spool.get(cuts[link].at) for link in sent}
    carried: Any = {}
    for transfer in due:
        if isinstance(transfer, Relayed):
            yield from cuts.pass_on(*transfer)
            continue
        cut, answer = cuts[transfer.link], answers[transfer.link]
        assert answer is not None
        if transfer.sends:
            cut.send_file(transfer.kind, File(answer.data), carried or answer.content)
            continue
        carried = party.carried((yield from cut.receive_message(transfer.kind)))
        if cut.received != answer.asked:
            plan.mismatched.add(cut.at.client)


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
            figures, _ = compute(party, party.front, (x, y), at)
            grads, content = encode_state(party.front.gradients()), figures_content(party, figures)
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
    figures = party.told_figures(message, num_samples)
    assert figures is not None
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
    for at, x, y, _ in _batches(party, round_index):
        figures, _ = compute(party, party.front, (x, y), at)
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
