"""Evaluate a round's model on each client's own samples: both ends.

::

    client                                           server
    split inference: client_evaluate                 server_evaluate
      VALIDATION_LABELS   + labels {part}        ->
      VALIDATION_FEATURES + activations          ->
                                                 <-  VALIDATION_RESULT {samples, correct, loss_sum}
    a client that holds the whole model:
      VALIDATION_RESULT {part, per_class, ...}   ->

The side that computes the outputs records those of the test set.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sfl.archive.layout import ACTIVATIONS, LABELS, PREDICTIONS, model_path
from sfl.conversation.cut import EVALUATION, Cut
from sfl.conversation.party import TEST, VALIDATION, ClientParty, Party, ServerParty
from sfl.data.samples import Samples
from sfl.errors import ProtocolError
from sfl.files.torch_file import encode_state
from sfl.model.metrics import Tally, Total, checked
from sfl.model.segment import evaluate_step
from sfl.wire.driver import Conversation
from sfl.wire.messages import Message, MessageType


def client_evaluate(party: ClientParty, part: str, round_index: int) -> Conversation[Tally]:
    """Evaluate a part of the client's samples; faces ``server_evaluate``."""
    samples = party.data.validation if part == VALIDATION else party.data.test
    evaluate = _client_split if party.split.cuts else _client_whole_model
    return evaluate(party, part, samples, round_index)


def server_evaluate(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    """Evaluate a client's samples with the back, or receive the client's own result."""
    evaluate = _server_split if party.split.cuts else _server_receive_result
    return evaluate(party, part, round_index)


def _client_split(
    party: ClientParty, part: str, samples: Samples, round_index: int
) -> Conversation[Tally]:
    link, total = party.link, Total()
    for step, size in enumerate(party.split.evaluation_sizes(len(samples))):
        at = party.at(round_index, step)
        start = step * party.split.evaluation_batch
        x, y = party.data.batch(samples, slice(start, start + size))
        cut = Cut(party, at, size, EVALUATION)
        cut.send(LABELS, y, content={"part": part})
        cut.send(ACTIVATIONS, party.front.evaluate(x))
        yield link
        reply = link.receive_message_as_json(MessageType.VALIDATION_RESULT, at=at)
        total.add(_parse_tally(party, reply, size))
    return total.tally


def _server_split(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    link, total, predictions = party.link, Total(), _Predictions(part)
    for step, size in enumerate(party.split.evaluation_sizes(party.num_samples[part])):
        at = party.at(round_index, step)
        cut = Cut(party, at, size, EVALUATION)
        y, labels = yield from cut.receive(LABELS)
        _check_part(labels, part, party)
        z, _ = yield from cut.receive(ACTIVATIONS)
        with party.measure_compute():
            tally, outputs = evaluate_step(party.back, z, y)
            party.check_loss(tally.loss_sum, f"client {party.client}'s evaluation", at)
            predictions.add(y, outputs)
        link.send_message_as_json(
            MessageType.VALIDATION_RESULT, content=_tally_content(party, tally), at=at
        )
        total.add(tally)
    predictions.write(party, round_index)
    return total.tally


def _client_whole_model(
    party: ClientParty, part: str, samples: Samples, round_index: int
) -> Conversation[Tally]:
    total, predictions, start = Total(), _Predictions(part), 0
    for size in party.split.evaluation_sizes(len(samples)):
        party.count_batch(round_index)
        x, y = party.data.batch(samples, slice(start, start + size))
        tally, outputs = evaluate_step(party.front, x, y)
        predictions.add(y, outputs)
        total.add(tally)
        start += size
    predictions.write(party, round_index)
    whole, at = total.tally, party.at(round_index)
    content = _tally_content(party, whole) | {"part": part}
    if table := party.task.table:
        content[table.name] = [] if whole.table is None else whole.table.tolist()
    party.link.send_message_as_json(MessageType.VALIDATION_RESULT, content=content, at=at)
    yield from ()
    return whole


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

    def write(self, party: Party, round_index: int) -> None:
        """Write labels and outputs to the archive, for analyses such as ROC curves."""
        if self._labels:
            path = model_path(PREDICTIONS, round_index, client=party.client)
            outputs = torch.cat(self._outputs)
            both = {"labels": torch.cat(self._labels), party.task.output_name: outputs}
            party.archive.write("predictions", path, encode_state(both), round_index)


def _server_receive_result(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    yield party.link
    at = party.at(round_index)
    message = party.link.receive_message_as_json(MessageType.VALIDATION_RESULT, at=at)
    _check_part(message, part, party)
    tally = _parse_tally(party, message, party.num_samples[part])
    party.check_loss(tally.loss_sum, f"client {party.client}'s evaluation", at)
    if not (tally.samples and (table := party.task.table)):
        return tally
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
