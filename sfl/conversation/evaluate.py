"""Evaluate a round's model on each client's own samples: both ends.

::

    client                                           server
    split inference: client_evaluate                 server_evaluate
      VALIDATION_LABELS   + labels {part}        ->
      VALIDATION_FEATURES + activations          ->
                                                 <-  VALIDATION_RESULT {samples, correct, loss_sum}
    a client that holds the last segment:
      VALIDATION_RESULT {part, per_class, ...}   ->

Between the two, ``hop_evaluate``.

The side that computes the outputs records those of the test set.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, LABELS, PREDICTIONS, model_path
from sfl.conversation.cuts import Cuts
from sfl.conversation.party import EVALUATION, TEST, VALIDATION, ClientParty, Party, ServerParty
from sfl.conversation.passes import evaluation_pass
from sfl.errors import NotFinite, ProtocolError, StepFailed
from sfl.files.torch_file import encode_state
from sfl.model.metrics import Tally, Total, checked
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message, MessageType
from sfl.wire.passing import pass_on


def client_evaluate(party: ClientParty, part: str, round_index: int) -> Conversation[Tally]:
    """Evaluate a part of the client's samples; faces ``server_evaluate``."""
    samples = party.data.validation if part == VALIDATION else party.data.test
    total, predictions = Total(), _Predictions(part)
    for step, size in enumerate(party.split.evaluation_sizes(len(samples))):
        if party.computes_loss:
            party.count_batch(round_index)
        start = step * party.split.evaluation_batch
        x, y = party.data.batch(samples, slice(start, start + size))
        cuts = Cuts(party, party.at(round_index, step), size, part)
        if party.sends_labels:
            cuts.first.send(LABELS, y, content={"part": part})
        found = yield from evaluation_pass(party, cuts, x, y)
        if found:
            tally, outputs = found
            predictions.add(y, outputs)
        else:
            yield party.link
            reply = party.link.receive_message_as_json(MessageType.VALIDATION_RESULT, at=cuts.at)
            tally = _parse_tally(party, reply, size)
        total.add(tally)
    predictions.write(party, round_index)
    if party.computes_loss:
        _send_own_result(party, part, total.tally, round_index)
    return total.tally


def server_evaluate(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    """Evaluate a client's samples with the server's segments, or receive the client's result."""
    with party.measure_span(EVALUATION):
        return (yield from _server_evaluate(party, part, round_index))


def _server_evaluate(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    link, total, predictions = party.link, Total(), _Predictions(part)
    is_cut = bool(party.split.cuts)
    sizes = party.split.evaluation_sizes(party.num_samples[part]) if is_cut else ()
    for step, size in enumerate(sizes):
        cuts, y = Cuts(party, party.at(round_index, step), size, part), None
        if party.sends_labels:
            y, labels = yield from cuts.first.receive(LABELS)
            _check_part(labels, part, party)
        if found := (yield from _evaluate_batch(party, cuts, part, y)):
            tally, outputs = found
            link.send_message_as_json(
                MessageType.VALIDATION_RESULT, content=_tally_content(party, tally), at=cuts.at
            )
            if y is not None:  # else the samples count at the client that has their labels
                predictions.add(y, outputs)
                total.add(tally)
    predictions.write(party, round_index)
    predictions.tell(party)
    if is_cut and party.computes_loss:
        return total.tally
    return (yield from _receive_result(party, part, round_index))


def hop_evaluate(party: ServerParty, part: str, round_index: int) -> Conversation[None]:
    """Evaluate a client's samples with a hop's segments; pass on what is for the other end."""
    client, onward, shares = party.link, party.onward, party.recipe.shares_labels
    assert onward is not None
    for step, size in enumerate(party.split.evaluation_sizes(party.num_samples[part])):
        cuts = Cuts(party, party.at(round_index, step), size, part)
        if party.sends_labels:
            yield from cuts.pass_labels_on()
        yield from _pass_batch(party, cuts)
        if shares:
            yield from pass_on(onward, client, MessageType.VALIDATION_RESULT, at=cuts.at)
    if not shares:
        at = party.at(round_index)
        yield from pass_on(client, onward, MessageType.VALIDATION_RESULT, at=at)


def _pass_batch(party: ServerParty, cuts: Cuts) -> Conversation[None]:
    """Compute a hop's part of a batch's evaluation; once, if all clients evaluate it together."""
    step = cuts.joint_step
    if step and not party.leads:
        if step.is_done():
            yield from cuts.first.receive_message(ACTIVATIONS)
            return
        z, _ = yield from cuts.first.receive(ACTIVATIONS)
        yield from step.contribute(cuts.first, z)
        return
    yield from evaluation_pass(party, cuts, None, None)
    if step:
        step.finish(None)


def _evaluate_batch(
    party: ServerParty, cuts: Cuts, part: str, y: Tensor | None
) -> Conversation[tuple[Tally, Tensor] | None]:
    """Return tally and outputs of a batch; None where the client computes them.

    A batch that all clients evaluate together is computed once, even if a client repeats its part.
    """
    step = cuts.joint_step
    if step and not (party.leads or party.joins):  # a hop joins them
        yield step.is_done
        found: tuple[Tally, Tensor] | None = step.reply
    elif step and step.is_done():
        yield from cuts.own_first.receive_message(ACTIVATIONS)
        found = step.reply
    elif step and not party.leads:
        z, _ = yield from cuts.first.receive(ACTIVATIONS)
        found = yield from step.contribute(cuts.first, z)
    else:
        with cuts.blaming_nobody(StepFailed):
            found = yield from evaluation_pass(party, cuts, None, y)
        if found:
            of_what = f"client {party.client}'s evaluation"
            with cuts.blaming_nobody(NotFinite):
                party.check_loss(found[0].loss_sum, of_what, cuts.at)
        if step and found:
            tally, outputs = found
            step.finish((tally, outputs if part == TEST else outputs.new_empty(0)))
    return found


def _send_own_result(party: ClientParty, part: str, whole: Tally, round_index: int) -> None:
    """Send the client's own figures of a part.

    Where nothing of its labels may be sent, figures of each class are its own choice, and those of
    a single sample, whose loss may tell its label, are left out.
    """
    is_private = party.recipe.keeps_labels
    whole = Tally() if is_private and whole.samples == 1 else whole
    content = _tally_content(party, whole) | {"part": part}
    if (table := party.task.table) and not (is_private and not party.shares_figures):
        content[table.name] = [] if whole.table is None else whole.table.tolist()
    at = party.at(round_index)
    party.link.send_message_as_json(MessageType.VALIDATION_RESULT, content=content, at=at)


class _Predictions:
    """Labels and outputs of the test set, batch by batch; other parts are not kept."""

    def __init__(self, part: str) -> None:
        self._is_kept = part == TEST
        self._labels: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def add(self, labels: Tensor, outputs: Tensor) -> None:
        if self._is_kept:
            self._labels.append(labels)
            self._outputs.append(outputs)

    @functools.cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        """All labels and outputs, once they are there."""
        return torch.cat(self._labels), torch.cat(self._outputs)

    def write(self, party: Party, round_index: int) -> None:
        """Write labels and outputs to the archive, for analyses such as ROC curves."""
        if self._labels:
            path = model_path(PREDICTIONS, round_index, client=party.client)
            labels, outputs = self._whole
            both = {"labels": labels, party.task.output_name: outputs}
            party.archive.write("predictions", path, encode_state(both), round_index)

    def tell(self, party: ServerParty) -> None:
        """Tell the run's figures of labels and outputs."""
        if self._labels:
            party.watcher.predicted(party.client, *self._whole)


def _receive_result(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    yield party.link
    at = party.at(round_index)
    message = party.link.receive_message_as_json(MessageType.VALIDATION_RESULT, at=at)
    _check_part(message, part, party)
    size = party.num_samples[part]
    withheld = size == 1 and message.get("samples", int) == 0
    tally = Tally() if withheld else _parse_tally(party, message, size)
    party.check_loss(tally.loss_sum, f"client {party.client}'s evaluation", at)
    table = party.task.table
    if not tally.samples or not table or table.name not in message.content:
        return tally  # a client may keep its figures of each class to itself
    rows, classes = message.get(table.name, list), party.split.num_classes
    counted = table.checked(rows, tally.counts, tally.samples, classes)
    return dataclasses.replace(tally, table=counted)


def _check_part(message: Message, part: str, party: ServerParty) -> None:
    if message.get("part", str) != part:
        raise ProtocolError(f"client {party.client} evaluates another part than {part}")


def _tally_content(party: Party, tally: Tally) -> dict[str, Any]:
    counts = party.task.named_counts(tally.counts)
    return {"samples": tally.samples, **counts, "loss_sum": tally.loss_sum}


def _parse_tally(party: Party, message: Message, size: int) -> Tally:
    """Return the peer's counts and loss over ``size`` samples, checked."""
    if (samples := message.get("samples", int)) != size:
        raise ProtocolError(f"{samples} samples were evaluated, of which there are {size}")
    counts = [message.get(name, int) for name in party.task.counted]
    loss_sum, counted = checked(message.get("loss_sum", float), counts, size)
    return Tally(size, counted, loss_sum)
