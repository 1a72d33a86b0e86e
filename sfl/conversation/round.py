"""Run the rounds between a client and the server: both ends.

``step`` has a round's steps, ``evaluate`` the evaluation, ``sfl.weights`` the exchange of weights::

    client                                           server
    client_run                                       rounds.run_all
      client_start                                   server_start
                                                <-   GO_ON {front, own}
                                                <-   the weights at the start of its first round
      client_round
        if it takes part in the round: client_train  server_train
                                                <-   START_TRAINING {front, steps}
                                                <-   the preceding client's front, if relayed
          step: the round's steps                     step
          ROUND_TRAINED {compute_s, ...}        ->
          the client's weights                  ->
        client_evaluate_part                         server_evaluate_part
                                                <-   START_VALIDATION {front, part, best}
                                                <-   the averaged weights
        evaluate: this part of its data              evaluate
        the same for the test part, if it is evaluated in this round
                                                <-   VALIDATION_DONE {metrics of the round}
                                                <-   TRAINING_DONE {metrics of the run}
      UNREGISTER                                ->

``front`` names the weights that the client loads first; "" means that it keeps its own. ``best`` is
the round, of those before, whose models stay as the best; -1: none.

A client that reconnects begins at ``client_start`` again and repeats its part of the current round.
The server knows which of its steps are done, and answers them without computing them again.
"""

import contextlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sfl.archive.layout import CLIENT_OPTIMIZER, ONE_CLIENT_MODEL, segment_path
from sfl.conversation.alignment import server_send_order
from sfl.conversation.evaluate import client_evaluate, server_evaluate
from sfl.conversation.party import (
    PREFIXES,
    TRAINING,
    ClientParty,
    Party,
    RoundResult,
    ServerParty,
)
from sfl.conversation.step import STEPS
from sfl.crash import crash_point
from sfl.data.client_data import num_batches
from sfl.errors import ConnectionLost, ProtocolError, quoted
from sfl.files.torch_file import decode_state, encode_state
from sfl.files.torch_reader import Buffer
from sfl.model import class_weights
from sfl.model.metrics import Tally
from sfl.model.topology import States, joined
from sfl.strategy.merge import has_client_state
from sfl.strategy.order import RoundPlan
from sfl.strategy.schemes import Fronts
from sfl.values import Position
from sfl.weights.exchange import (
    AVERAGE,
    INITIAL,
    NamedWeights,
    WeightKey,
    check_name,
    client_weights,
)
from sfl.wire.driver import Conversation
from sfl.wire.link import Counters
from sfl.wire.messages import Message, MessageType

SECONDS_WIDTH = 16  # characters
TIMES = ("compute_s", "wait_s", "transfer_s")
ROUND_STARTS = (MessageType.START_TRAINING, MessageType.START_VALIDATION)


def client_round(party: ClientParty, message: Message) -> Conversation[dict[str, float]]:
    """Train if the client is drawn, then evaluate what the server asks for; return its metrics.

    ``message``: the server's first in the round, of a type in ``ROUND_STARTS``.
    """
    at = message.at
    if message.type is MessageType.START_TRAINING:
        yield from client_train(party, message)
        message = yield from _receive_order(party, MessageType.START_VALIDATION, at=at)
    party.archive.keep_best(message.get("best", int))
    _save_own_state(party, at.round)
    own, left = dict[str, float](), set(PREFIXES)
    while message.type is MessageType.START_VALIDATION:
        part = message.get("part", str)
        if part not in left:
            raise ProtocolError(f"the server asks for the part {quoted(part, 40)} of our data")
        left.remove(part)
        own |= yield from client_evaluate_part(party, message, part)
        next_types = MessageType.START_VALIDATION, MessageType.VALIDATION_DONE
        message = yield from _receive_order(party, *next_types, at=at)
    return own


def _receive_order(
    party: ClientParty, *types: MessageType, at: Position | None = None
) -> Conversation[Message]:
    """Receive what the main server says to do next, and tell the servers of further tasks."""
    yield party.link
    message = party.link.receive_message_as_json(*types, at=at)
    told = {}
    if message.type is MessageType.START_VALIDATION:
        told = {"part": message.get("part", str), "best": message.get("best", int)}
    for side in party.others:
        side.link.send_message_as_json(message.type, content=told, at=message.at)
    for side in party.others if message.type is MessageType.GO_ON else ():
        yield side.link  # until it is ready
        side.link.receive_message_as_json(MessageType.GO_ON, at=message.at)
    return message


def client_evaluate_part(
    party: ClientParty, message: Message, part: str
) -> Conversation[dict[str, float]]:
    """Evaluate the round's weights on a part of the data; faces ``server_evaluate_part``.

    The main server comes last: what it has evaluated is evaluated everywhere.
    """
    yield from _receive_front(party, message)
    crash_point("validation.before")
    for side in party.others:
        yield from client_evaluate(side, part, message.at.round)
        yield side.link
        side.link.receive_message_as_json(MessageType.VALIDATION_DONE, at=message.at)
    tally = yield from client_evaluate(party, part, message.at.round)
    return party.task.figures(tally, PREFIXES[part])


def server_evaluate_part(
    party: ServerParty, front: NamedWeights | None, round_index: int, *, part: str, best: int
) -> Conversation[Tally]:
    """Send a client the round's resulting weights, and evaluate them on a part of its data."""
    at = party.at(round_index)
    yield from _send_front(party, MessageType.START_VALIDATION, front, at, part=part, best=best)
    tally = yield from server_evaluate(party, part, round_index)
    party.ready_for_round = round_index + 1
    return tally


def client_train(party: ClientParty, start: Message) -> Conversation[None]:
    """Train for a round and send the resulting weights; faces ``server_train``."""
    link, at, row = party.link, start.at, party.recipe.scheme
    yield from _receive_front(party, start)
    started, before, num_steps = time.perf_counter(), link.counters.copy(), start.get("steps", int)
    with party.profile.round(at, num_steps, party.clock, link, party.archive):
        own_steps = num_batches(len(party.data.train), party.run.batch_size)
        party.watcher.start_round(at.round, own_steps * party.run.local_epochs)
        party.segments.start_round(at.round)
        party.segments.last.weigh_classes(_parse_weights(start, party))
        yield from STEPS[row.exchange].client(party, at.round, num_steps)
    crash_point("trained.before_said")
    spent = _seconds_spent(party, time.perf_counter() - started, before)
    for side in party.at_each_server:
        side.link.send_message_as_json(MessageType.ROUND_TRAINED, content=spent, at=at)
    if row.fronts is not Fronts.OWN:
        key = WeightKey(client_weights(party.client), at)
        front = encode_state(joined(party.segments.states()))
        crash_point("weights.before_put")
        yield from party.weights.put(key, front, len(party.data.train))
        crash_point("weights.after_put")


def server_train(
    party: ServerParty, plan: RoundPlan, round_index: int
) -> Conversation[RoundResult]:
    """Train with one client for a round, when it is its turn, and receive its weights."""
    link, at, row = party.link, party.at(round_index), party.recipe.scheme
    yield plan.turn_of(party.client)
    steps = plan.num_steps_for(party.client)
    yield from _send_front(
        party,
        MessageType.START_TRAINING,
        plan.begin(party.client),
        at,
        steps=steps,
        class_weights=list(party.split.class_weights),
    )
    with (
        party.measure_span(TRAINING),
        party.profile.round(at, steps, party.clock, link, party.archive),
    ):
        yield from STEPS[row.exchange].server(party, plan, round_index)
    if party.backs and plan.can_undo(party.client):
        name = f"the server-side weights after client {party.client}'s steps"
        party.check_state(joined(party.backs[party.back_index].states()), name, at)
    yield link
    trained = link.receive_message_as_json(MessageType.ROUND_TRAINED, at=at)
    seconds = {name: _parse_seconds(trained.get(name, str)) for name in TIMES}
    party.trained_round = round_index
    plan.release(party.client)
    if row.fronts is Fronts.OWN:
        return RoundResult({}, seconds)
    name = client_weights(party.client)
    data = yield from party.weights.get(WeightKey(name, at))
    states: States = {}
    if data:  # else the client sends them to the fed server
        states = _decode_front(party, data, f"the weights of client {party.client}", at)
    # A relay forwards the received bytes unchanged: a store compares an object's checksum.
    plan.end_turn(party.client, NamedWeights(name, bytes(data)))
    return RoundResult(states, seconds)


def _decode_front(party: Party, data: Buffer, name: str, at: Position) -> States:
    """Decode and check a peer's file of the clients' segments."""
    front = decode_state(data, party.split.front_spec, name)
    party.check_state(front, name, at)
    return party.split.by_segment(front)


def _parse_weights(start: Message, party: ClientParty) -> list[float]:
    """Return the class weights of the loss, for a client that computes it.

    Where its labels stay here they are those of the run's options: others would pick out classes.
    """
    weights, num_classes = start.get("class_weights", list), party.split.num_classes
    if party.recipe.keeps_labels and tuple(weights) != class_weights.parse(party.run.class_weights):
        raise ProtocolError("the weights of the classes are not those of --class-weights")
    valid = all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    if not valid or len(weights) not in (0, num_classes):
        raise ProtocolError(f"{len(weights)} weights of {num_classes} classes make no sense")
    return weights


def _receive_front(party: ClientParty, message: Message, held: bytes = b"") -> Conversation[None]:
    """Load the front that a message names, if any; faces ``_send_front``.

    ``held``: the file of the current weights; if it is the same file, nothing is transferred.
    """
    if name := message.get("front", str):
        data = yield from party.weights.get(WeightKey(check_name(name), message.at), held)
        party.segments.load(_decode_front(party, data, f"the weights {name}", message.at))


def _send_front(
    party: ServerParty, message: MessageType, front: NamedWeights | None, at: Position, **more: Any
) -> Conversation[None]:
    """Send a message, and the front that the client is to load; None: it keeps its own."""
    content = {"front": front.name if front else "", **more}
    party.link.send_message_as_json(message, content=content, at=at)
    if front:
        key = WeightKey(front.name, at)
        if front.name in (INITIAL, AVERAGE):
            yield from party.weights.put(key, front.data, front.samples)
        else:
            yield from party.weights.pass_on(key, front.data)


def _seconds_spent(party: ClientParty, total_s: float, before: Counters) -> dict[str, str]:
    """Return the times of a round's steps in seconds, as text of fixed width.

    The width makes the number of bytes on the wire independent of the measured times.
    """
    now = party.link.counters
    sending_s, receiving_s = now.sending_s - before.sending_s, now.receiving_s - before.receiving_s
    waited_s = party.clock.spent["wait"]
    waiting_s = waited_s - receiving_s
    spent = (total_s - waited_s - sending_s, waiting_s, sending_s + receiving_s)
    return {
        name: f"{max(s, 0.0):0{SECONDS_WIDTH}.6f}" for name, s in zip(TIMES, spent, strict=True)
    }


def _parse_seconds(text: str) -> float:
    if not (len(text) == SECONDS_WIDTH and re.fullmatch(r"\d+\.\d{6}", text, re.ASCII)):
        raise ProtocolError(f"{quoted(text, 40)} are no seconds")
    return float(text)


def _save_own_state(party: ClientParty, round_index: int) -> None:
    """Write the client's own state to disk before the server can commit the round."""
    if not has_client_state(party.recipe):
        return
    files = {}
    for name, segment in party.segments.items():
        if party.recipe.scheme.fronts is Fronts.OWN:
            path = segment_path(ONE_CLIENT_MODEL, name, round_index, client=party.client)
            files[path] = "one_client_model", encode_state(segment.state())
        if party.recipe.training.keeps_optimizer:
            path = segment_path(CLIENT_OPTIMIZER, name, round_index, client=party.client)
            files[path] = "client_optimizer", encode_state(segment.optimizer.state())
    for path, (kind, data) in files.items():
        party.archive.write(kind, path, data, round_index)
    party.archive.commit(round_index + 1, asdict(party.run), {}, files)
    party.archive.flush()


def client_start(party: ClientParty) -> Conversation[int]:
    """Load the weights at the start of the first round to run; return that round."""
    message = yield from _receive_order(party, MessageType.GO_ON)
    first = message.at.round + 1
    if message.at != party.at(first - 1) or first > party.run.rounds:
        raise ProtocolError(f"the server lets us go on after {message.at}")
    party.on_start(first, message.get("own", int))
    held = encode_state(joined(party.segments.states()))
    yield from _receive_front(party, message, held)
    return first


def server_start(
    party: ServerParty, front: NamedWeights | None, round_index: int
) -> Conversation[None]:
    """Send a client the weights at a round's start, unless it has them; faces ``client_start``."""
    if party.ready_for_round != round_index:
        at, own = party.at(round_index - 1), party.own_round
        if party.order:
            server_send_order(party.link, party.order)
        yield from _send_front(party, MessageType.GO_ON, front, at, own=own)
        party.ready_for_round = round_index


def client_run(party: ClientParty) -> Conversation[None]:
    """Take part in the run's remaining rounds; faces ``Rounds.run_all``."""
    round_index = yield from client_start(party)
    while (message := (yield from _next_round(party, round_index))) is not None:
        own = yield from client_round(party, message)
        party.archive.end_round(round_index)
        party.on_round(round_index, own)
        round_index += 1
    crash_point("run.before_goodbye")
    for side in party.at_each_server:
        with contextlib.suppress(ConnectionLost):  # the run is done, even if the message is lost
            side.link.send_message_as_json(MessageType.UNREGISTER)


def _next_round(party: ClientParty, round_index: int) -> Conversation[Message | None]:
    """Return the first message of a round; None: the run ended with the round before."""
    starts = ROUND_STARTS if round_index < party.run.rounds else ()
    message = yield from _receive_order(
        party, *starts, MessageType.TRAINING_DONE, at=party.at(round_index)
    )
    return None if message.type is MessageType.TRAINING_DONE else message


def server_goodbye(
    party: ServerParty, figures: Mapping[str, float], num_rounds: int
) -> Conversation[None]:
    """Send the end of the run, and wait until the client unregisters."""
    at = party.at(num_rounds)
    party.link.send_message_as_json(MessageType.TRAINING_DONE, content=dict(figures), at=at)
    yield party.link
    party.link.receive_message_as_json(MessageType.UNREGISTER)
