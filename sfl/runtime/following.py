"""Run a party that follows the main server: a hop, or the server of a further task.

A hop stands between the clients, or an earlier hop, and the server, or a later one: for each client
one connection comes from before and one goes on. If either is lost, the hop closes both: the client
comes back, and repeats its part of the round. A task's server has the clients' connections alone;
of the main server it asks, over one more, whether a client belongs to the run. All conversations
run on one thread.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sfl.archive.live_status import LiveStatus, Now
from sfl.archive.run_folder import SERVER_LOG, make_folder, open_folder, reporting_failure, say
from sfl.config import RunConfig
from sfl.conversation.followed import FollowerJoined
from sfl.conversation.join import Welcome, parse_hello
from sfl.conversation.report import describe_data, disagreeing_clients
from sfl.environment import set_up_devices
from sfl.errors import (
    PEER_ERRORS,
    AuthError,
    ConfigError,
    ConnectionLost,
    LetGo,
    NotYet,
    PeerCannot,
    PeerLeft,
    PeerStopped,
    ProtocolError,
    RunEnded,
    RunError,
    SflError,
    counted,
)
from sfl.nodes import ServerNode
from sfl.options import check_goes_on
from sfl.runtime.follower import Follower, follower_folder
from sfl.runtime.follower_kinds import Kind
from sfl.runtime.lobby import GOODBYE_S, LINGER_S, POLL_S, REGISTER_WITHIN_S
from sfl.runtime.on_end import running_at_end
from sfl.runtime.resume import has_begun, open_past
from sfl.runtime.start_weights import read_start, started
from sfl.runtime.whereabouts import in_followed
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.tokens import SERVER, Tokens, client_authenticate
from sfl.transport.transports import ServerNetwork
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Conversation, Gate, run_blocking
from sfl.wire.link import Link, Peer, last_words_for
from sfl.wire.members import Dialler, Member
from sfl.wire.messages import Message, MessageType
from sfl.wire.payload import payload_store_in

MOST_CLIENTS = 1000  # before the run's number is known
NEXT_WITHIN_S = 60.0  # in which the next party must answer
ALONE_S = 60.0  # in which clients may come back when others have said that the run is over


@dataclass
class _Talk:
    """One client's conversation, and what it waits for."""

    member: Member
    conversation: Conversation[None]
    due: Link | Gate | None = None
    onward: Member | None = None
    client: int = -1  # once it has registered


@dataclass
class Following:
    """A follower with an open port."""

    kind: Kind
    node: ServerNode
    network: ServerNetwork
    dialler: Dialler
    stack: contextlib.ExitStack
    tokens: Tokens | None  # what the next party is shown
    run_config: RunConfig | None = None  # once the server has told it
    follower: Follower | None = None  # once all clients have joined
    _talks: dict[Member, _Talk] = field(default_factory=dict)  # by the client's connection
    _joined: dict[int, FollowerJoined] = field(default_factory=dict)
    _notices: deque[tuple[Member, str]] = field(default_factory=deque)
    _is_known: bool = False  # whether the next party has been reached before
    _over_since: float = math.inf  # when we have seen that a client was told that the run is over

    def __post_init__(self) -> None:
        self._calls = Calls(self.network.wake)
        self.name = self.node.role.replace(":", "_")

    def run(self) -> None:
        """Pass on and compute until the run is over."""
        while not self._is_over():
            self.network.wait_until(self._is_ready, POLL_S)
            while self._notices:
                member, line = self._notices.popleft()
                with contextlib.suppress(SflError):
                    member.send_message_as_json(MessageType.MESSAGE, content=line)
            here = set(self.network.members)
            for member in self.network.ready_members():
                if member in here:  # one that is just being added, next time
                    self._take(member)
            self._refuse_odd()
            if talk := self._next_talk():
                self._resume(talk)
            self._drop_idle()
        if self.follower:
            self.follower.note_end()
        say("the run is over")

    def _is_over(self) -> bool:
        """Return whether all clients have left at the run's end, or have had time to."""
        rounds = self.follower.rounds if self.follower else None
        is_here = any(talk.client in self._joined for talk in self._talks.values())
        # A client that was killed at the end never says so at a task's server: the others do.
        if rounds is None or not (rounds.is_over or (rounds.said_over and not is_here)):
            self._over_since = math.inf
            return False
        self._over_since = min(self._over_since, time.monotonic())
        patience_s = (LINGER_S if is_here else GOODBYE_S) if self._joined else 0.0
        return time.monotonic() - self._over_since >= (patience_s if rounds.is_over else ALONE_S)

    # Waiting

    def _links(self) -> Collection[Link]:
        return {talk.due for talk in self._talks.values() if isinstance(talk.due, Link)}

    def _is_ready(self) -> bool:
        return bool(
            self._notices or self.network.ready_members()
            or self.network.first_arrived(self._links()) or self._open()
        )  # fmt: skip

    def _open(self) -> _Talk | None:
        """Return a conversation whose gate is open."""
        waiting = (t for t in self._talks.values() if t.due and not isinstance(t.due, Link))
        return next((t for t in waiting if t.due()), None)  # type: ignore[operator, misc]

    def _next_talk(self) -> _Talk | None:
        if talk := self._open():
            return talk
        arrived = self.network.first_arrived(self._links())
        return next((t for t in self._talks.values() if arrived and t.due is arrived), None)

    def _take(self, member: Member) -> None:
        """Begin with a new connection; end the conversation of one that has failed."""
        talk = next((t for t in self._talks.values() if member in (t.member, t.onward)), None)
        if talk is None and member.end_reason() is None and not member.is_assigned:
            member.name, member.is_assigned = self.name, True
            talk = self._talks[member] = _Talk(member, self._converse(member))
            self._resume(talk)
        elif talk is None:
            self.network.drop(member, "", MessageType.UNREGISTER)
        elif talk.due is not member and (why := member.end_reason()):
            self._end(talk, why, member)

    def _resume(self, talk: _Talk) -> None:
        try:
            talk.due = next(talk.conversation)
        except StopIteration:
            self._talks.pop(talk.member)
            for link in filter(None, (talk.member, talk.onward)):
                self.network.drop(link, "", MessageType.UNREGISTER)
        except (*PEER_ERRORS, NotYet) as error:
            self._end(talk, error, talk.due)

    def _end(self, talk: _Talk, error: SflError, source: Link | Gate | None = None) -> None:
        """End a client's conversation on both sides, each with its last words.

        ``source``: what the error comes from, if it is a connection.

        Raises:
            RunEnded: the server ended the run.
        """
        if isinstance(error, RunEnded) and self._is_believed(talk, source):
            self.network.end(str(error), MessageType.END_RUN)
            raise error
        if self._talks.pop(talk.member, None) is None:
            return
        talk.conversation.close()
        if not self.follower:  # it may come back with other data
            self._joined.pop(talk.client, None)
        who = f"client_{talk.client}" if talk.client >= 0 else talk.member.address
        (say if talk.client >= 0 else functools.partial(self.network.log_refusal, ""))(
            f"{who}: {error}"
        )
        # A run that its server ends before the start is over for its clients, as without us.
        is_over = type(error) is PeerStopped and not self.follower
        words = MessageType.ABORT if is_over else last_words_for(error)
        self.network.drop(talk.member, str(error), words)
        if talk.onward:
            kinds = {PeerLeft: MessageType.UNREGISTER, PeerCannot: MessageType.FAILED}
            last = next((m for kind, m in kinds.items() if isinstance(error, kind)), None)
            self.network.drop(talk.onward, str(error), last or MessageType.ABORT)

    def _is_believed(self, talk: _Talk, source: Link | Gate | None) -> bool:
        """Return whether the run has ended: the next party says so, or all clients do."""
        if not self.kind.only_asks:
            return talk.onward is not None and source is talk.onward
        if rounds := self.follower.rounds if self.follower else None:
            rounds.said_over.add(talk.client)
        return rounds is not None and rounds.is_over

    def _refuse_odd(self) -> None:
        """End the conversations of clients whose data do not fit those of the others."""
        if self.follower or self.run_config is None or not self._has_all():
            return
        reports = {k: joined.report for k, joined in self._joined.items()}
        odd = disagreeing_clients(reports, self._recipe_of(self.run_config))
        for talk in [t for t in self._talks.values() if t.client in odd]:
            self._joined.pop(talk.client, None)
            self._end(talk, ProtocolError(odd[talk.client]))

    def _drop_idle(self) -> None:
        why = f"register within {REGISTER_WITHIN_S:g} seconds"
        for member in self.network.members:
            if not member.is_assigned and member.age_s() > REGISTER_WITHIN_S:
                self.network.drop(member, why, MessageType.TRY_AGAIN)
        for talk in [t for t in self._talks.values() if t.client < 0]:
            if talk.member.age_s() > NEXT_WITHIN_S + REGISTER_WITHIN_S:  # it only checks
                self._end(talk, NotYet(why))

    # One client

    def _converse(self, member: Member) -> Conversation[None]:
        """Hold one client's conversation, from its first message to its last."""
        talk = self._talks[member]
        yield member
        joined = yield from self.kind.join(self.node.role)(
            member, functools.partial(self._connect, talk), functools.partial(self._welcome, talk),
            self._rounds_here, self.network.heartbeat_s,
        )  # fmt: skip
        if joined is None:
            return
        self._joined[joined.client] = joined
        yield joined.onward or joined.link
        yield self._has_all
        follower = self.follower or self._prepare()
        if follower.data["digests"][str(joined.client)] != joined.report.digest:
            raise ProtocolError(f"client_{joined.client} has other data than it had in this run")
        split = follower.split.of_party(joined.client)
        limits = self.kind.limits(split, payload_store_in(follower.folder.path))
        for link in filter(None, (joined.link, joined.onward)):
            link.limits = limits
        party = follower.party(joined.client, joined.link, joined.onward)
        yield from self.kind.run(party, follower.rounds)
        self._joined.pop(joined.client, None)

    def _connect(self, talk: _Talk, hello: Message) -> Conversation[Link]:
        """Connect to the next party on behalf of a client, and prove the token, if there is one.

        Raises:
            ProtocolError: it has proved to be another client, or no neighbour of ours.
        """
        wanted, _ = parse_hello(talk.member, hello, {self.kind.caller(self.node.role)})

        def connect() -> Member:
            link = self.dialler.connect(self.node.next, NEXT_WITHIN_S, is_reconnect=self._is_known)
            assert isinstance(link, Member)
            if self.tokens is not None:
                peer = Peer(self.node.role, wanted)
                authenticate = client_authenticate(link, self.tokens, peer, listener=SERVER)
                link.proved_run = run_blocking(authenticate)
            if talk.member not in self._talks:  # lost meanwhile
                self.network.drop(link, "the client has left", MessageType.ABORT)
            return link

        try:
            link = yield from self._calls.run(connect)
        except (AuthError, RunError) as error:
            # Those before us are not told where the next party is, nor what lies here.
            self.network.log_refusal("", f"{self.node.next}: {error}")
            us = self.node.role.replace(":", " ")
            if isinstance(error, RunError):
                raise ConnectionLost(f"{us} does not reach the party behind it") from error
            both = f"{us} and the party behind it do not trust each other"
            raise AuthError(f"{both}: see what {us} prints") from error
        self._is_known = True
        if not self.kind.only_asks:
            talk.onward = link
        link.name, link.peer_name = self.name, "server"

        def note(line: str) -> None:
            self._notices.append((talk.member, line))
            self.network.wake()

        link.on_notice = note
        return link

    def _welcome(self, talk: _Talk, told: Welcome) -> Recipe:
        """Take note of the server's answer to a client; return the run's recipe.

        Raises:
            RunError: it has another run than before, or one that this hop has no part of.
        """
        for other in [t for t in self._talks.values() if t.client == told.client]:
            self._end(other, ConnectionLost(f"client_{told.client} has connected anew"))
        talk.client = told.client
        if self.run_config not in (None, told.run) and self._keeps_run(talk):
            assert self.run_config is not None
            try:
                check_goes_on(dataclasses.asdict(self.run_config), dataclasses.asdict(told.run))
            except ConfigError as error:
                raise ProtocolError(f"the server has another run now: {error}") from error
            self._end_others(talk.client)
            self.follower = None
        recipe = self._recipe_of(told.run)
        self.run_config = told.run
        return recipe

    def _keeps_run(self, talk: _Talk) -> bool:
        """Return whether our run has begun, or others than this client have registered for it."""
        others = any(t.client >= 0 for t in self._talks.values() if t is not talk)
        return others or self.follower is not None or has_begun(self._path)

    def _recipe_of(self, run: RunConfig) -> Recipe:
        """Return the recipe of a run, as this party has it.

        Raises:
            RunError: the run has no such party.
        """
        try:
            _, recipe = Recipe.of(run, self.node.allowed_imports).in_role(self.node.role)
        except ConfigError as error:
            raise RunError(str(error)) from error
        return recipe

    def _end_others(self, client: int) -> None:
        for talk in [t for t in self._talks.values() if t.client != client]:
            self._end(talk, LetGo("the server goes on from an earlier round"))

    @property
    def _path(self) -> Path:
        assert self.run_config is not None
        return follower_folder(self.node, self.node.role) / self.run_config.run

    def _rounds_here(self, run: RunConfig) -> tuple[int, ...]:
        """Return the rounds whose start lies here; without any, the first, which needs nothing."""
        if not has_begun(self._path):
            return (0,)
        return tuple(checkpoint.round for checkpoint in open_past(self._path, run).checkpoints)

    def _has_all(self) -> bool:
        """Return whether a run's first conversation can begin: all clients have told their data."""
        assert self.run_config is not None
        there = len(self._joined) == self.run_config.clients
        return self.follower is not None or there or has_begun(self._path)

    def _prepare(self) -> Follower:
        """Open the folder, and build this party's segments.

        Raises:
            RunError: the folder is another's, or cannot be written.
            ConfigError: the model does not fit this machine.
        """
        assert self.run_config is not None
        recipe, path = self._recipe_of(self.run_config), self._path
        past = open_past(path, recipe.run) if has_begun(path) else None
        if past is None and not make_folder(path, SERVER_LOG):
            raise RunError(f"{path} is of another run of this name: give another --out")
        start = None if past else read_start(self.node.init, recipe)
        recipe = started(recipe, start)
        reports = {k: joined.report for k, joined in sorted(self._joined.items())}
        data = past.data if past else describe_data(reports, recipe)
        copies = len(recipe.scheme.backs_of(range(recipe.run.most_clients)))
        devices = set_up_devices(
            self.node, copies, f"--role {self.node.role} of --scheme {recipe.run.scheme}"
        )
        self.stack.close()  # of an earlier folder
        self.stack.enter_context(running_at_end(self.node.on_end, path))
        folder = self.stack.enter_context(open_folder(path, SERVER_LOG, recipe.keep))
        self.stack.enter_context(reporting_failure(folder, self.network.end))
        split = SplitModel.of_data(recipe, data)
        self.follower = Follower(
            role=self.node.role, split=split, data=data, folder=folder, node=self.node,
            devices=devices, start=start, past=past,
        )  # fmt: skip
        names = " and ".join(split.held_by(self.follower.holder))
        folder.events.say(
            f"run {recipe.run.run}: the {names} of {recipe.title}, for"
            f" {counted(len(data['num_samples']), 'client')}; files lie in {path}"
        )
        self.stack.callback(self.follower.rounds.spool.close)
        self.follower.rounds.end_others = self._end_others
        self.stack.enter_context(LiveStatus(path, functools.partial(self._now, self.follower)))
        return self.follower

    def _now(self, follower: Follower) -> Now:
        here = {talk.client: talk.member for talk in self._talks.values()}
        return in_followed(follower.rounds, here)
