"""A hop: the party between the clients, or an earlier hop, and the server, or a later one.

For each client it holds one conversation on either side. It computes its own segments' part of each
step, as the server does (``step``, ``evaluate``), and passes everything else on unread::

    client                       hop                                    server
    REGISTER                 ->  hop_join                           ->
                             <-                                     <-  REGISTERED {config, ...}
    REQUEST_TO_START         ->  its own rounds narrow {rounds}     ->
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sfl.archive.spool import Spool
from sfl.config import RunConfig
from sfl.conversation.cut import Cut
from sfl.conversation.evaluate import hop_evaluate
from sfl.conversation.join import Welcome, parse_welcome
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.party import TRAIN, ServerParty
from sfl.conversation.report import DataReport, parse_report
from sfl.conversation.step import STEPS
from sfl.crash import crash_point
from sfl.data.client_data import num_batches
from sfl.errors import ProtocolError
from sfl.model.topology import Segments, States
from sfl.strategy.merge import Shared, Trained, averaging_weights, merge
from sfl.strategy.order import RoundPlan
from sfl.strategy.schemes import Fronts
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.weights.exchange import NamedWeights
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType
from sfl.wire.passing import pass_on


@dataclass(kw_only=True)
class HopRounds:
    """A hop's segments over the rounds of a run, for all clients.

    The server drives the rounds: what it sends a client tells the hop which round it is in.
    """

    split: SplitModel
    num_samples: Mapping[int, Mapping[str, int]]  # of all clients, in their order
    backs: Mapping[int, Segments]  # the copies of the hop's segments
    shared: Mapping[str, Shared]  # their weights at the start of the next round
    spool: Spool
    load: Callable[[int], Mapping[str, Shared]]  # a round's starting weights, into the copies
    # Records those of a round's start, and the clients that took part in the round before.
    commit: Callable[[int, Mapping[str, Shared], Sequence[int]], None]
    joint_steps: JointSteps[Cut] | None = None  # if clients take their steps together here
    end_others: Callable[[int], None] = lambda client: None  # before we go back to a round's start
    next_round: int = 0  # the round that ``shared`` is the start of
    plan: RoundPlan | None = None  # of the round in training, or of the last one
    trained: set[int] = field(default_factory=set)  # clients that have trained in it
    is_over: bool = False  # whether a client was told that the run is over

    def go_to(self, round_index: int, client: int) -> None:
        """Be ready for a round, the next or the current one; else go back to its start.

        ``client``: in whose conversation the server has named the round.

        Raises:
            RunError: what the round starts from does not lie here.
        """
        if round_index == self.next_round or (self.plan and self.plan.round_index == round_index):
            return
        self.end_others(client)
        if self.joint_steps:
            self.joint_steps.start([*self.num_samples])
        self.shared = self.load(round_index)
        self.next_round, self.plan = round_index, None

    def begin(self, round_index: int, client: int) -> RoundPlan:
        """Return the plan of a round that the server has started."""
        self.go_to(round_index, client)
        if self.plan and self.plan.round_index == round_index:
            return self.plan
        for copy in self.backs.values():
            copy.start_round(round_index)
        self.spool.start_round()
        run = self.split.recipe.run
        steps = {
            k: num_batches(parts[TRAIN], run.batch_size) * run.local_epochs
            for k, parts in self.num_samples.items()
        }
        if self.joint_steps:  # a client may still be in the evaluation of the round before
            self.joint_steps.forget_before(round_index - 1)
        self.plan = RoundPlan(self.split.recipe, round_index, steps, self.backs, spool=self.spool)
        self.trained = set()
        return self.plan

    def has_trained(self) -> bool:
        """Return whether all of the round's clients have trained; a gate.

        After a restart of this hop they do so again, one after another, while others evaluate.
        """
        return self.plan is not None and self.trained >= set(self.plan.order)

    def end(self) -> None:
        """Merge the copies of a round in which all have trained, once."""
        assert self.plan is not None
        round_index = self.plan.round_index
        if self.next_round > round_index:
            return
        order, recipe = sorted(self.plan.order), self.split.recipe
        crash_point("average.before")
        weights = averaging_weights(recipe.run, {k: self.num_samples[k][TRAIN] for k in order})
        by_copy = {b: copy.states() for b, copy in self.backs.items()}
        made = Trained({}, by_copy, weights, last=self.plan.order[-1])
        self.shared = merge(recipe, self.shared, made, self.split.entries)
        crash_point("average.after")
        self.commit(round_index + 1, self.shared, self.plan.order)
        for copy in self.backs.values():
            copy.load(self.states)
        self.next_round = round_index + 1

    @property
    def states(self) -> States:
        return {name: shared.state for name, shared in self.shared.items()}


# Joining


@dataclass(frozen=True)
class HopJoined:
    """A client that has joined through this hop."""

    client: int
    link: Link
    onward: Link
    report: DataReport


def hop_join(
    link: Link,
    connect: Callable[[Message], Conversation[Link]],
    welcome: Callable[[Welcome], None],
    rounds: Callable[[RunConfig], tuple[int, ...]],
    heartbeat_s: float,
) -> Conversation[HopJoined | None]:
    """Let a client register at the server; return None if it only checks.

    ``connect`` makes a link to the next party, for a first message. ``welcome`` is given the
    server's answer, before the client; ``rounds`` returns those whose start lies here.
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
    if hello.type is MessageType.REGISTER:
        welcome(told)
    link.send_message_as_json(answer.type, content={**answer.content, "heartbeat_s": heartbeat_s})
    if hello.type is MessageType.CHECK:
        yield from _pass_check_on(link, onward)
        return None
    link.peer_name = f"client_{told.client}"
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START)
    report = parse_report(message, told.client, told.run)
    ours = rounds(told.run)
    both = [r for r in ours if r in report.rounds or not report.rounds]
    if not both:
        raise ProtocolError(
            f"client_{told.client} has what the rounds {shown(report.rounds)} start from, and a hop"
            f" {shown(ours)}: start both where they ran before, with the same --out"
        )
    onward.send_message_as_json(message.type, content={**message.content, "rounds": both})
    return HopJoined(told.client, link, onward, report)


def _pass_check_on(link: Link, onward: Link) -> Conversation[None]:
    """Pass on what follows the first answer to a client that checks."""
    wanted = MessageType.REQUEST_TO_START, MessageType.UNREGISTER
    while (yield from pass_on(link, onward, *wanted)).type is not MessageType.UNREGISTER:
        yield from pass_on(onward, link, MessageType.CHECKED)
    yield from pass_on(onward, link, MessageType.UNREGISTER)


# The rounds


def hop_run(party: ServerParty, rounds: HopRounds) -> Conversation[None]:
    """Take part in the rest of a run for one client; between its ``client_run`` and the server."""
    link, onward = party.link, party.onward
    assert onward is not None
    while True:
        message = yield from pass_on(onward, link, *_PARTS, MessageType.TRAINING_DONE)
        if message.type is MessageType.TRAINING_DONE:
            rounds.is_over = True
            yield from pass_on(link, onward, MessageType.UNREGISTER)
            return
        yield from _PARTS[message.type](party, rounds, message)


def shown(rounds: Sequence[int]) -> str:
    """Return rounds as users count them."""
    return ", ".join(str(index + 1) for index in rounds)


def _start(party: ServerParty, rounds: HopRounds, message: Message) -> Conversation[None]:
    rounds.go_to(message.at.round + 1, party.client)
    yield from _pass_front(party, message)


def _train(party: ServerParty, rounds: HopRounds, message: Message) -> Conversation[None]:
    plan = rounds.begin(message.at.round, party.client)
    yield from _pass_front(party, message)
    yield plan.turn_of(party.client)
    plan.begin(party.client)
    row, at = party.recipe.scheme, message.at
    yield from STEPS[row.exchange].server(party, plan, at.round)
    assert party.onward is not None
    yield from pass_on(party.link, party.onward, MessageType.ROUND_TRAINED, at=at)
    plan.release(party.client)
    plan.end_turn(party.client, NamedWeights("", b""))  # the front passes us by
    rounds.trained.add(party.client)
    if party.client in plan.mismatched:
        party.watcher.say(
            f"warning: client_{party.client}, or the server, has sent other tensors than before in"
            " steps that were repeated: it computes other last bits now"
        )
    if row.fronts is not Fronts.OWN:
        yield from _pass_weights(party.link, party.onward, at)


def _evaluate(party: ServerParty, rounds: HopRounds, message: Message) -> Conversation[None]:
    rounds.begin(message.at.round, party.client)
    yield rounds.has_trained
    rounds.end()
    yield from _pass_front(party, message)
    yield from hop_evaluate(party, message.get("part", str), message.at.round)


def _end_round(party: ServerParty, rounds: HopRounds, message: Message) -> Conversation[None]:
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
