"""What client and server say to each other in a step, an evaluation, a round and a run.

Both ends stand here, facing each other; ``weights.py`` has the exchange of weights::

    client                                           server
    client_run                                       rounds.run_rounds
                                                <-   initial weights
      client_round                                   server_train
                                                <-   START_TRAINING
        client_step                                    server_step
        TRAINING_LABELS    + labels              ->
        TRAINING_FEATURES  + activations         ->
                                                <-   TRAINING_GRADS + gradients {loss, correct}
        ROUND_TRAINED {compute_s, ...}           ->
        the client's weights                     ->
                                                     server_evaluate
                                                <-   the averaged weights
        client_evaluate
        VALIDATION_LABELS   + labels {part}      ->
        VALIDATION_FEATURES + activations        ->
                                                <-   VALIDATION_RESULT {samples, correct, loss_sum}
                                                <-   VALIDATION_DONE {figures of the round}
                                                <-   TRAINING_DONE {figures of the run}
      UNREGISTER                                 ->
"""

import itertools
import re
import time
from collections.abc import Iterator

from torch import Tensor

from sfl.data import Samples, batch_indices, batch_sizes
from sfl.driver import Conversation
from sfl.errors import ProtocolError
from sfl.link import Counters
from sfl.party import PREFIXES, TRAIN, VALIDATION, ClientParty, RoundResult, ServerParty
from sfl.protocol import MessageType, Position
from sfl.segment import StepFigures, Tally, add_up, evaluate_step, train_step
from sfl.tensors import Buffer, decode, decode_state, encode, encode_state
from sfl.weights import WeightKey

SECONDS_WIDTH = 16  # characters
TIMES = ("compute_s", "wait_s", "transfer_s")


def client_step(party: ClientParty, indices: Tensor, at: Position) -> Conversation[StepFigures]:
    """Train the front on one batch; faces ``server_step``."""
    link = party.link
    x, y = party.data.batch(party.data.train, indices)
    z = party.front.forward(x, at)
    labels, features = encode(y), encode(z)
    link.send_file(MessageType.TRAINING_LABELS, labels, at=at)
    link.send_file(MessageType.TRAINING_FEATURES, features, at=at)
    asked = time.perf_counter()
    yield link
    reply = link.receive_file(MessageType.TRAINING_GRADS, at=at)
    party.waited_s += time.perf_counter() - asked
    spec = party.split.features_spec(len(y))
    party.front.backward(decode(reply.payload, spec, f"TRAINING_GRADS of step {at.step}"))
    party.front.update()
    party.record(at, at.step, len(y), (labels, features, bytes(reply.payload)))
    return StepFigures(reply.get("loss", float), reply.get("correct", int), len(y))


def server_step(
    party: ServerParty, num_samples: int, order: Iterator[int], at: Position
) -> Conversation[StepFigures]:
    """Train the back on one batch; faces ``client_step``.

    The gradients are on their way before the back's own update. ``order`` counts the steps of this
    copy of the back.
    """
    link = party.link
    yield link
    labels = link.receive_file(MessageType.TRAINING_LABELS, at=at).payload
    yield link
    features = link.receive_file(MessageType.TRAINING_FEATURES, at=at).payload
    started = time.perf_counter()
    y = _decode_labels(party, labels, num_samples)
    z = _decode_features(party, features, num_samples)
    figures, dz = train_step(party.back, z, y, at)
    grads = encode(dz)
    content = {"loss": figures.loss, "correct": figures.correct}
    link.send_file(MessageType.TRAINING_GRADS, grads, content=content, at=at)
    party.back.update()
    party.compute_s += time.perf_counter() - started
    party.record(at, next(order), num_samples, (labels, features, grads))
    return figures


def _decode_labels(party: ServerParty, data: Buffer, num_samples: int) -> Tensor:
    name = f"the labels of client {party.client}"
    y = decode(data, party.split.labels_spec(num_samples), name)
    if not 0 <= int(y.min()) <= int(y.max()) < party.split.num_classes:
        raise ProtocolError(f"{name} lie outside 0 to {party.split.num_classes - 1}")
    return y


def _decode_features(party: ServerParty, data: Buffer, num_samples: int) -> Tensor:
    spec = party.split.features_spec(num_samples)
    return decode(data, spec, f"the activations of client {party.client}")


def client_evaluate(
    party: ClientParty, part: str, samples: Samples, round_index: int
) -> Conversation[Tally]:
    """Evaluate some of the client's samples by split inference; faces ``server_evaluate``."""
    link, tallies = party.link, []
    for step, size in enumerate(party.split.evaluation_sizes(len(samples))):
        at = party.at(round_index, step)
        start = step * party.split.evaluation_batch
        x, y = party.data.batch(samples, slice(start, start + size))
        features = encode(party.front.evaluate(x))
        content = {"part": part}
        link.send_file(MessageType.VALIDATION_LABELS, encode(y), content=content, at=at)
        link.send_file(MessageType.VALIDATION_FEATURES, features, at=at)
        yield link
        reply = link.receive_message_as_json(MessageType.VALIDATION_RESULT, at=at)
        correct, loss_sum = reply.get("correct", int), reply.get("loss_sum", float)
        tallies.append(Tally(reply.get("samples", int), correct, loss_sum))
    return add_up(tallies)


def server_evaluate(party: ServerParty, part: str, round_index: int) -> Conversation[Tally]:
    """Evaluate a client's samples with the back; faces ``client_evaluate``."""
    link, tallies = party.link, []
    for step, size in enumerate(party.split.evaluation_sizes(party.num_samples[part])):
        at = party.at(round_index, step)
        yield link
        labels = link.receive_file(MessageType.VALIDATION_LABELS, at=at)
        if labels.get("part", str) != part:
            raise ProtocolError(f"client {party.client} evaluates another part than {part}")
        yield link
        features = link.receive_file(MessageType.VALIDATION_FEATURES, at=at).payload
        started = time.perf_counter()
        y = _decode_labels(party, labels.payload, size)
        tally = evaluate_step(party.back, _decode_features(party, features, size), y)
        party.compute_s += time.perf_counter() - started
        content = {"samples": size, "correct": tally.correct, "loss_sum": tally.loss_sum}
        link.send_message_as_json(MessageType.VALIDATION_RESULT, content=content, at=at)
        tallies.append(tally)
    return add_up(tallies)


def client_round(party: ClientParty, round_index: int) -> Conversation[dict[str, float]]:
    """Train, have the weights averaged, evaluate; return the client's own figures."""
    run, link, at = party.run, party.link, party.at(round_index)
    yield link
    link.receive_message_as_json(MessageType.START_TRAINING, at=at)
    started, before, party.waited_s = time.perf_counter(), link.counters.copy(), 0.0
    if run.optimizer_state == "reset":
        party.front.reset_optimizer()
    batches = batch_indices(
        len(party.data.train), run, round_index=round_index, client=party.client
    )
    for step, indices in enumerate(batches):
        step_at = party.at(round_index, step)
        figures = yield from client_step(party, indices, step_at)
        party.watcher.step(step_at, figures)
    spent = _seconds_spent(party, time.perf_counter() - started, before)
    link.send_message_as_json(MessageType.ROUND_TRAINED, content=spent, at=at)
    name = f"client_{party.client}"
    yield from party.weights.put(WeightKey(name, at), encode_state(party.front.state()))
    average = yield from party.weights.get(WeightKey("client_avg", at))
    party.front.load(decode_state(average, party.split.front_spec, "the averaged weights"))
    own: dict[str, float] = {}
    for part in party.parts(round_index):
        samples = party.data.validation if part == VALIDATION else party.data.test
        tally = yield from client_evaluate(party, part, samples, round_index)
        own |= tally.figures(PREFIXES[part])
    yield link
    link.receive_message_as_json(MessageType.VALIDATION_DONE, at=at)
    return own


def _seconds_spent(party: ClientParty, total_s: float, before: Counters) -> dict[str, str]:
    """Return where the time of a round's steps went, as text of one width.

    So that the number of bytes on the wire does not depend on how long something took.
    """
    now = party.link.counters
    sending_s, receiving_s = now.sending_s - before.sending_s, now.receiving_s - before.receiving_s
    waiting_s = party.waited_s - receiving_s
    spent = (total_s - party.waited_s - sending_s, waiting_s, sending_s + receiving_s)
    return {
        name: f"{max(s, 0.0):0{SECONDS_WIDTH}.6f}" for name, s in zip(TIMES, spent, strict=True)
    }


def server_train(
    party: ServerParty, order: Iterator[int], round_index: int
) -> Conversation[RoundResult]:
    """Train the back with one client through a round, and take its weights."""
    run, link, at = party.run, party.link, party.at(round_index)
    link.send_message_as_json(MessageType.START_TRAINING, at=at)
    epochs = (
        batch_sizes(party.num_samples[TRAIN], run.batch_size) for _ in range(run.local_epochs)
    )
    for step, size in enumerate(itertools.chain.from_iterable(epochs)):
        step_at = party.at(round_index, step)
        figures = yield from server_step(party, size, order, step_at)
        party.watcher.step(step_at, figures)
    yield link
    trained = link.receive_message_as_json(MessageType.ROUND_TRAINED, at=at)
    seconds = {name: _parse_seconds(trained.get(name, str)) for name in TIMES}
    name = f"client_{party.client}"
    data = yield from party.weights.get(WeightKey(name, at))
    front = decode_state(data, party.split.front_spec, f"the weights of client {party.client}")
    return RoundResult(front, seconds)


def _parse_seconds(text: str) -> float:
    if not (len(text) == SECONDS_WIDTH and re.fullmatch(r"\d+\.\d{6}", text, re.ASCII)):
        raise ProtocolError(f"{text!r:.40} are no seconds")
    return float(text)


def server_evaluate_round(
    party: ServerParty, average: bytes, round_index: int
) -> Conversation[dict[str, Tally]]:
    """Send a client the averaged weights and evaluate what follows from them."""
    yield from party.weights.put(WeightKey("client_avg", party.at(round_index)), average)
    tallies = {}
    for part in party.parts(round_index):
        tallies[part] = yield from server_evaluate(party, part, round_index)
    return tallies


def client_run(party: ClientParty) -> Conversation[None]:
    """Take part in all rounds of a run; faces ``rounds.run_rounds``."""
    held = encode_state(party.front.state())
    initial = yield from party.weights.get(WeightKey("init", party.at(-1)), held)
    party.front.load(decode_state(initial, party.split.front_spec, "the initial weights"))
    for round_index in range(party.run.rounds):
        own = yield from client_round(party, round_index)
        party.archive.end_round(round_index)
        party.on_round(round_index, own)
    yield party.link
    party.link.receive_message_as_json(MessageType.TRAINING_DONE)
    party.link.send_message_as_json(MessageType.UNREGISTER)


def server_goodbye(party: ServerParty) -> Conversation[None]:
    """Wait until a client has taken its leave."""
    yield party.link
    party.link.receive_message_as_json(MessageType.UNREGISTER)
