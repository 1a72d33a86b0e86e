"""The server of a further task: both ends.

It has a back, labels and a loss of its own, and follows the main server's rounds, of which each
client tells it. That a client belongs to the run it asks the main server itself::

    client                       task's server                          main server
    REGISTER                 ->  task_join
                                 CHECK {task, instance, ...}        ->
                                                                    <-  CHECKED {config, place, ...}
                             <-  REGISTERED {config, rounds, ...}
    REQUEST_TO_START         ->
                                 CHECK {task, instance, ...}        ->
                                                                    <-  CHECKED {reported, ...}
    GO_ON                    ->  task_run
                             <-  GO_ON, when all clients have told their data
    START_TRAINING           ->  the round begins when all clients are in it
      a step, repeated           as at the main server, with this task's labels
    ROUND_TRAINED            ->  average the copies of the back, when all have trained
    START_VALIDATION {part}  ->
      an evaluation batch        as at the main server
                             <-  VALIDATION_DONE {metrics of the part}, when all have evaluated
    VALIDATION_DONE          ->
    TRAINING_DONE            ->
    UNREGISTER               ->

A client passes on what the main server says (``round._receive_order``). One that says something
else waits for the others in vain, and has no effect on their training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sfl.config import RunConfig
from sfl.conversation.evaluate import server_evaluate
from sfl.conversation.followed import (
    FollowedRounds,
    FollowerJoined,
    begin_training,
    end_training,
)
from sfl.conversation.join import Welcome, parse_heartbeat, parse_hello, parse_welcome
from sfl.conversation.party import PREFIXES, ServerParty
from sfl.conversation.report import parse_report
from sfl.errors import NotYet, ProtocolError, quoted
from sfl.model.metrics import Tally
from sfl.strategy.order import RoundPlan
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Conversation
from sfl.wire.link import ANY_ID, CLIENT, Link, one_line
from sfl.wire.messages import Message, MessageType


@dataclass(kw_only=True)
class TaskRounds(FollowedRounds):
    """The back of a task's server over the rounds of a run, for all clients."""

    # Given a round, a part of the data and the clients' tallies; returns the figures, on disk.
    evaluated: Callable[[int, str, Mapping[int, Tally]], Mapping[str, float]]
    reached: dict[int, int] = field(default_factory=dict)  # the round that each client is in
    best: dict[int, int] = field(default_factory=dict)  # the best round, as each client says
    _tallies: dict[str, dict[int, Tally]] = field(default_factory=dict)  # by part, of this round
    _figures: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def all_are_in(self, round_index: int) -> bool:
        """Return whether a round can begin, or has begun; a gate.

        So no client alone can let it begin, or let all go back to an earlier one.
        """
        if self.plan and self.plan.round_index == round_index:
            return True
        return all(self.reached.get(k) == round_index for k in self.num_samples)

    @property
    def is_over(self) -> bool:
        """Whether the run is over: all clients say so."""
        return self.said_over >= self.num_samples.keys()

    def begin(self, round_index: int, client: int) -> RoundPlan:
        if not (self.plan and self.plan.round_index == round_index):
            self._tallies, self._figures = {}, {}
            self.said_over.clear()  # whoever said so was wrong
        return super().begin(round_index, client)

    def add(self, part: str, client: int, tally: Tally) -> None:
        self._tallies.setdefault(part, {})[client] = tally

    def has_evaluated(self, part: str) -> bool:
        """Return whether all clients have evaluated a part; a gate."""
        return self._tallies[part].keys() >= self.num_samples.keys()

    def figures(self, part: str) -> Mapping[str, float]:
        """Return the figures of a part that all have evaluated, recorded once."""
        assert self.plan is not None
        if part not in self._figures:
            self._figures[part] = self.evaluated(self.plan.round_index, part, self._tallies[part])
        return self._figures[part]


def task_join(
    name: str,
    link: Link,
    connect: Callable[[Message], Conversation[Link]],
    welcome: Callable[[Welcome], Recipe],
    rounds: Callable[[RunConfig], tuple[int, ...]],
    heartbeat_s: float,
) -> Conversation[FollowerJoined]:
    """Register a client that the main server has registered, and that has told it the same data.

    ``name``: of the task. Other parameters as of ``hop_join``.
    """
    yield link
    hello = link.receive_message_as_json(MessageType.REGISTER)
    wanted, fingerprint = parse_hello(link, hello, {CLIENT})
    if wanted == ANY_ID:
        raise ProtocolError("register at the main server first")
    asked = {"client_id": wanted, "fingerprint": dict(fingerprint), "task": name}
    asked["instance"] = hello.get("instance", str)

    def ask() -> Conversation[tuple[Welcome, Message]]:
        main = yield from connect(hello)
        main.send_message_as_json(MessageType.CHECK, content=asked)
        yield main
        answer = main.receive_message_as_json(MessageType.CHECKED)
        told, place = parse_welcome(main, answer, wanted), answer.get("place", str)
        main.send_message_as_json(MessageType.UNREGISTER)
        if place:
            raise NotYet(f"the main server says: {one_line(place)}")
        return told, answer

    told, answer = yield from ask()
    recipe = welcome(told)
    link.heartbeat_s = parse_heartbeat(hello)
    content = {**answer.content, "heartbeat_s": heartbeat_s, "rounds": rounds(told.run)}
    link.send_message_as_json(MessageType.REGISTERED, content=content)
    link.peer_name = f"client_{told.client}"
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START)
    report = parse_report(message, told.client, told.run, aligns=recipe.aligns)
    yield link  # until the main server has let it go on, and so accepted its report
    _, answer = yield from ask()
    ours = {"num_samples": dict(report.num_samples), "input_shape": list(report.input_shape)}
    if answer.get("reported", dict) != ours:
        raise ProtocolError(f"client_{told.client} has told the main server other data")
    return FollowerJoined(told.client, link, report)


def task_run(party: ServerParty, rounds: TaskRounds) -> Conversation[None]:
    """Take part in the rest of a run for one client; faces ``client_run``."""
    while True:
        yield party.link
        message = party.link.receive_message_as_json(*_PARTS, MessageType.TRAINING_DONE)
        if message.type is MessageType.TRAINING_DONE:
            rounds.said_over.add(party.client)
            yield party.link
            party.link.receive_message_as_json(MessageType.UNREGISTER)
            return
        if message.at != party.at(message.at.round):
            raise ProtocolError(f"the client says what to do at {message.at}")
        yield from _PARTS[message.type](party, rounds, message)


def _start(party: ServerParty, rounds: TaskRounds, message: Message) -> Conversation[None]:
    round_index = message.at.round + 1
    if round_index < party.run.rounds and not rounds.may_start(round_index):
        raise ProtocolError(f"what round {round_index + 1} starts from does not lie here")
    rounds.reached[party.client] = round_index
    party.link.send_message_as_json(MessageType.GO_ON, at=message.at)
    yield from ()


def _in_round(party: ServerParty, rounds: TaskRounds, message: Message) -> Conversation[RoundPlan]:
    """Return the plan of the round that a client is in, when all clients are."""
    round_index = message.at.round
    if rounds.reached.get(party.client) != round_index:
        raise ProtocolError(f"the client is not in round {round_index + 1}")
    yield lambda: rounds.all_are_in(round_index)
    return rounds.begin(round_index, party.client)


def _train(party: ServerParty, rounds: TaskRounds, message: Message) -> Conversation[None]:
    plan = yield from _in_round(party, rounds, message)
    if party.client not in plan.order:
        raise ProtocolError("the client is not drawn for this round")
    yield from begin_training(party, plan)
    yield party.link
    party.link.receive_message_as_json(MessageType.ROUND_TRAINED, at=message.at)
    end_training(party, rounds, plan)


def _evaluate(party: ServerParty, rounds: TaskRounds, message: Message) -> Conversation[None]:
    part = message.get("part", str)
    if part not in PREFIXES:
        raise ProtocolError(f"the client evaluates the part {quoted(part, 40)}")
    yield from _in_round(party, rounds, message)
    yield rounds.has_trained
    rounds.end()
    rounds.best[party.client] = message.get("best", int)
    rounds.add(part, party.client, (yield from server_evaluate(party, part, message.at.round)))
    yield lambda: rounds.has_evaluated(part)
    figures = dict(rounds.figures(part))
    if len(agreed := set(rounds.best.values())) == 1:
        party.archive.keep_best(*agreed)
    party.link.send_message_as_json(MessageType.VALIDATION_DONE, content=figures, at=message.at)


def _end_round(party: ServerParty, rounds: TaskRounds, message: Message) -> Conversation[None]:
    rounds.reached[party.client] = message.at.round + 1
    yield from ()


_PARTS = {
    MessageType.GO_ON: _start,
    MessageType.START_TRAINING: _train,
    MessageType.START_VALIDATION: _evaluate,
    MessageType.VALIDATION_DONE: _end_round,
}
