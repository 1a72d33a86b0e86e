"""The rounds of a party beside the main server, which follows what that server tells the clients.

Such are hops, and the servers of further tasks.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sfl.archive.spool import Spool
from sfl.conversation.cut import Cut
from sfl.conversation.joint_steps import JointSteps
from sfl.conversation.party import PREFIXES, TRAIN, ServerParty
from sfl.conversation.report import DataReport
from sfl.conversation.step import STEPS
from sfl.crash import crash_point
from sfl.data.client_data import num_batches
from sfl.model.topology import Segments, States
from sfl.strategy.merge import Shared, Trained, averaging_weights, merge
from sfl.strategy.order import RoundPlan
from sfl.strategy.split_model import SplitModel
from sfl.weights.exchange import NamedWeights
from sfl.wire.driver import Conversation
from sfl.wire.link import Link


@dataclass(kw_only=True)
class FollowedRounds:
    """The segments of a party that follows the main server, over the rounds of a run.

    The server drives the rounds: what it sends a client tells the party which round it is in.
    """

    split: SplitModel
    num_samples: Mapping[int, Mapping[str, int]]  # of all clients, in their order
    backs: Mapping[int, Segments]  # the copies of its segments
    shared: Mapping[str, Shared]  # their weights at the start of the next round
    spool: Spool
    load: Callable[[int], Mapping[str, Shared]]  # a round's starting weights, into the copies
    kept: Callable[[], Collection[int]]  # rounds whose starting weights can be loaded
    # Records those of a round's start, and the clients that took part in the round before.
    commit: Callable[[int, Mapping[str, Shared], Sequence[int]], None]
    begun: Callable[[RoundPlan], object] = lambda plan: None  # told when a round begins
    joint_steps: JointSteps[Cut] | None = None  # if clients take their steps together here
    end_others: Callable[[int], None] = lambda client: None  # before we go back to a round's start
    next_round: int = 0  # the round that ``shared`` is the start of
    plan: RoundPlan | None = None  # of the round in training, or of the last one
    trained: set[int] = field(default_factory=set)  # clients that have trained in it
    said_over: set[int] = field(default_factory=set)  # clients that say that the run is over

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
        self.begun(self.plan)
        return self.plan

    def may_start(self, round_index: int) -> bool:
        """Return whether what a round starts from lies here, or the round is in training."""
        is_now = self.plan is not None and self.plan.round_index == round_index
        return is_now or round_index == self.next_round or round_index in self.kept()

    def is_past(self, round_index: int) -> bool:
        """Return whether a later round has begun here."""
        return self.plan is not None and self.plan.round_index > round_index

    def repeat_evaluation(self, part: str, party: ServerParty) -> None:
        """Let all clients of joint steps evaluate again if the one that leads them does.

        The others would wait behind batches that they have given to already.
        """
        joint, plan = self.joint_steps, self.plan
        assert plan is not None
        if joint and party.leads and joint.has_done(part, plan.round_index):
            self.end_others(party.client)
            joint.forget(PREFIXES, plan.round_index)

    @property
    def is_over(self) -> bool:
        """Whether the run is over: the server has told a client so, in our hearing."""
        return bool(self.said_over)

    def has_trained(self) -> bool:
        """Return whether all of the round's clients have trained; a gate.

        After a restart of this party they do so again, one after another, while others evaluate.
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


@dataclass(frozen=True)
class FollowerJoined:
    """A client that has joined at a party which follows the main server."""

    client: int
    link: Link
    report: DataReport
    onward: Link | None = None  # of a hop


def begin_training(party: ServerParty, plan: RoundPlan) -> Conversation[None]:
    """Take a client's steps of a round, when it is its turn."""
    yield plan.turn_of(party.client)
    plan.begin(party.client)
    yield from STEPS[party.recipe.scheme.exchange].server(party, plan, plan.round_index)


def end_training(party: ServerParty, rounds: FollowedRounds, plan: RoundPlan) -> None:
    """Note that a client has trained; its front passes us by."""
    plan.release(party.client)
    plan.end_turn(party.client, NamedWeights("", b""))
    rounds.trained.add(party.client)
    if party.client in plan.mismatched:
        party.watcher.say(
            f"warning: client_{party.client}, or the server, has sent other tensors than before in"
            " steps that were repeated: it computes other last bits now"
        )
