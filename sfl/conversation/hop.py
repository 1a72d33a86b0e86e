"""A hop: the party between the clients, or an earlier hop, and the server, or a later one.

For each client it holds one conversation on either side. It computes its own segments' part of each
step, as the server does (``step``, ``evaluate``), and passes everything else on unread::

    client                       hop                                    server
    REGISTER                 ->  hop_join                           ->
                             <-                                     <-  REGISTERED {config, ...}
    REQUEST_TO_START         ->  its own rounds narrow {rounds}     ->
      ids (sealed)           ->  where samples are aligned          ->
      ids (sealed), counts   <-                                     <-
                             <-  hop_run                            <-  GO_ON, weights
                             <-                                     <-  START_TRAINING, weights
      z = front(x)               a step, repeated:
      labels (sealed)        ->                                     ->
      activations z          ->  u = segment(z); activations u      ->  loss(back(u), y)
      gradients of z         <-  segment's backward and update      <-  gradients of u
    ROUND_TRAINED, weights   ->                                     ->
                                 average the segment's copies
                             <-                                     <-  START_VALIDATION, weights
      an evaluation batch        an evaluation batch                    an evaluation batch
                             <-                                     <-  VALIDATION_DONE
                             <-                                     <-  TRAINING_DONE
    UNREGISTER               ->                                     ->

What is passed on is sealed by its sender for the other end of the chain, see ``sfl.wire.seal``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sfl.config import RunConfig
from sfl.conversation.alignment import hop_pass_ids
from sfl.conversation.evaluate import hop_evaluate
from sfl.conversation.followed import (
    FollowedRounds,
    FollowerJoined,
    begin_training,
    end_training,
)
from sfl.conversation.join import Welcome, parse_welcome
from sfl.conversation.party import ServerParty
from sfl.conversation.report import parse_report
from sfl.errors import ProtocolError
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Fronts
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType
from sfl.wire.passing import pass_on

# Joining


def hop_join(
    link: Link,
    connect: Callable[[Message], Conversation[Link]],
    welcome: Callable[[Welcome], Recipe],
    rounds: Callable[[RunConfig], tuple[int, ...]],
    heartbeat_s: float,
) -> Conversation[FollowerJoined | None]:
    """Let a client register at the server; return None if it only checks.

    ``connect`` makes a link to the next party, for a first message. ``welcome`` is given the
    server's answer, before the client, and returns the run's recipe; ``rounds`` returns those whose
    start lies here.
    ``heartbeat_s``: the interval in which this hop expects a client's messages.
    """
    yield link
    hello = link.receive_message_as_json(MessageType.REGISTER, MessageType.CHECK)
    wanted = hello.get("client_id", int)
    onward = yield from connect(hello)
    asked = {**hello.content, "heartbeat_s": heartbeat_s}
    onward.send_message_as_json(hello.type, content=asked)
    yield onward
    answer = onward.receive_message_as_json(MessageType.REGISTERED, MessageType.CHECKED)
    told = parse_welcome(onward, answer, wanted)
    recipe = welcome(told) if hello.type is MessageType.REGISTER else None
    link.send_message_as_json(answer.type, content={**answer.content, "heartbeat_s": heartbeat_s})
    if recipe is None:
        yield from _pass_check_on(link, onward)
        return None
    link.peer_name = f"client_{told.client}"
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START)
    report = parse_report(message, told.client, told.run, aligns=recipe.aligns)
    ours = rounds(told.run)
    both = [r for r in ours if r in report.rounds or not report.rounds]
    if not both:
        raise ProtocolError(
            f"client_{told.client} has what the rounds {shown(report.rounds)} start from, and a hop"
            f" {shown(ours)}: start both where they ran before, with the same --out"
        )
    onward.send_message_as_json(message.type, content={**message.content, "rounds": both})
    if recipe.aligns:
        counts = yield from hop_pass_ids(link, onward, report.num_samples)
        report = replace(report, num_samples=counts)
    return FollowerJoined(told.client, link, report, onward)


def _pass_check_on(link: Link, onward: Link) -> Conversation[None]:
    """Pass on what follows the first answer to a client that checks."""
    wanted = MessageType.REQUEST_TO_START, MessageType.UNREGISTER
    while (yield from pass_on(link, onward, *wanted)).type is not MessageType.UNREGISTER:
        yield from pass_on(onward, link, MessageType.CHECKED)
    yield from pass_on(onward, link, MessageType.UNREGISTER)


# The rounds


def hop_run(party: ServerParty, rounds: FollowedRounds) -> Conversation[None]:
    """Take part in the rest of a run for one client; between its ``client_run`` and the server."""
    link, onward = party.link, party.onward
    assert onward is not None
    while True:
        message = yield from pass_on(onward, link, *_PARTS, MessageType.TRAINING_DONE)
        if message.type is MessageType.TRAINING_DONE:
            rounds.said_over.add(party.client)
            yield from pass_on(link, onward, MessageType.UNREGISTER)
            return
        yield from _PARTS[message.type](party, rounds, message)


def shown(rounds: Sequence[int]) -> str:
    """Return rounds as users count them."""
    return ", ".join(str(index + 1) for index in rounds)


def _start(party: ServerParty, rounds: FollowedRounds, message: Message) -> Conversation[None]:
    rounds.go_to(message.at.round + 1, party.client)
    yield from _pass_front(party, message)


def _train(party: ServerParty, rounds: FollowedRounds, message: Message) -> Conversation[None]:
    plan = rounds.begin(message.at.round, party.client)
    yield from _pass_front(party, message)
    row, at = party.recipe.scheme, message.at
    yield from begin_training(party, plan)
    assert party.onward is not None
    yield from pass_on(party.link, party.onward, MessageType.ROUND_TRAINED, at=at)
    end_training(party, rounds, plan)
    if row.fronts is not Fronts.OWN:
        yield from _pass_weights(party.link, party.onward, at)


def _evaluate(party: ServerParty, rounds: FollowedRounds, message: Message) -> Conversation[None]:
    round_index, part = message.at.round, message.get("part", str)
    # Of a part without samples no answer is due: the others may be in a later round by now.
    if party.num_samples[part] or not rounds.is_past(round_index):
        rounds.begin(round_index, party.client)
        yield rounds.has_trained
        rounds.end()
        party.archive.keep_best(message.get("best", int))
        rounds.repeat_evaluation(part, party)
    yield from _pass_front(party, message)
    yield from hop_evaluate(party, part, round_index)


def _end_round(party: ServerParty, rounds: FollowedRounds, message: Message) -> Conversation[None]:
    yield from ()


_PARTS = {
    MessageType.GO_ON: _start,
    MessageType.START_TRAINING: _train,
    MessageType.START_VALIDATION: _evaluate,
    MessageType.VALIDATION_DONE: _end_round,
}


def _pass_front(party: ServerParty, message: Message) -> Conversation[None]:
    """Pass the front on that a message names, if any."""
    if message.get("front", str):
        assert party.onward is not None
        yield from _pass_weights(party.onward, party.link, message.at)


def _pass_weights(source: Link, target: Link, at: Position) -> Conversation[None]:
    """Pass weights on, unless the target has them; between the ends of a ``WeightStore``."""
    offer = yield from pass_on(source, target, MessageType.REQUEST_TO_SEND_FILE, at=at)
    answer = yield from pass_on(target, source, MessageType.SEND_FILE, at=at)
    if answer.get("offset", int) < offer.get("bytes", int):
        kinds = MessageType.SEND_MODEL, MessageType.SEND_AGGREGATED_MODEL
        yield from pass_on(source, target, *kinds, at=at)
