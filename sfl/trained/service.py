"""``run_server.py --serve RUN``: hold the server's segments of a trained model for requesters.

All of them are served by one thread, a batch of each in turn. One that breaks the protocol or
fails is ended alone; the service goes on until it is told to stop.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from sfl.archive.run_folder import say
from sfl.config import RunConfig
from sfl.conversation.inference import InferenceParty, Offer, server_serve
from sfl.conversation.limits import inference_limits
from sfl.environment import set_up_torch
from sfl.errors import ConfigError, HasClosed, NotYet, SflError, counted, reason_of
from sfl.interactive.run import Run
from sfl.model.topology import Holder, Segments
from sfl.nodes import ServerNode
from sfl.runtime.lobby import POLL_S, REGISTER_WITHIN_S
from sfl.runtime.memory import memory_limit_bytes
from sfl.strategy.split_model import SplitModel
from sfl.trained.export import back_checksum
from sfl.trained.inputs import expected_of
from sfl.trained.models import run_of, usable
from sfl.transport.buffered import READ_AHEAD_MESSAGES
from sfl.transport.guard import Terms, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import SERVER
from sfl.transport.transports import ServerNetwork, transport_of
from sfl.wire.driver import Conversation
from sfl.wire.link import last_words_for
from sfl.wire.members import Member
from sfl.wire.messages import MessageType

MOST_REQUESTERS = 500  # at once
FILES_EACH = READ_AHEAD_MESSAGES + 1  # of a requester: those read ahead, one that is computed with
# Where all places are taken, a requester that has had no batch for so long makes room for others.
IDLE_S = 30.0


def serve_model(run: RunConfig, node: ServerNode) -> None:
    """Serve the back of the run in the folder ``node.serve``, until interrupted.

    Raises:
        ConfigError: options of training are given, or the run's server holds nothing.
        RunError: the port or the folder cannot be used.
    """
    if run != RunConfig():
        raise ConfigError("--serve: the model is trained; leave out the options of a run")
    with open_service(node) as service:
        say(service.title)
        for line in transport_of(node).notes(node):
            say(line)
        service.run()


@contextlib.contextmanager
def open_service(node: ServerNode) -> Iterator["Service"]:
    """Listen for requesters of the run in the folder ``node.serve``.

    Raises:
        ConfigError, RunError: as ``serve_model``.
    """
    transport = transport_of(node)
    guard = guard_of(node, SERVER, MOST_REQUESTERS)
    served = run_of(node.serve, {"threads": node.threads, "allow_import": node.allow_import})
    holding = _Holding.of(served, set_up_torch(node))
    guard = dataclasses.replace(guard, run=served.config.run)
    terms = Terms(node.peer_timeout, heartbeat_s=interval_s(node.peer_timeout))
    with (
        transport.listen(node, 1) as listener,
        transport.serve(listener, terms, guard, RefusalLog(say)) as network,
    ):
        most = most_requesters(holding.split, memory_limit_bytes(node))
        offer = Offer(
            run=served.config.run,
            round=served.last_round(),
            seed=served.config.seed,
            back_checksum=back_checksum(served),
            heartbeat_s=network.heartbeat_s,
        )
        title = (
            f"run {offer.run}, as after round {offer.round + 1} of {served.config.rounds}:"
            f" listening on {listener.address} with the {' and '.join(holding.segments)} of"
            f" {holding.split.recipe.title}, for {counted(most, 'requester')} at once"
        )
        yield Service(network, holding, offer, most, listener.address, title)


def most_requesters(split: SplitModel, limit_bytes: int) -> int:
    """Return how many requesters fit into so much memory at once.

    Raises:
        ConfigError: not one does.
    """
    received, answer = (
        inference_limits(split, holder).largest_payload_bytes
        for holder in (Holder.SERVER, Holder.CLIENT)
    )
    needed = FILES_EACH * received + answer
    most = min(MOST_REQUESTERS, limit_bytes // needed)
    if not most:
        raise ConfigError(
            f"--memory-limit: one requester needs {needed / 1e6:,.0f} MB for its"
            f" batches; the limit is {limit_bytes / 1e6:,.0f} MB"
        )
    return most


@dataclass(frozen=True)
class _Holding:
    """The server's trained segments."""

    split: SplitModel
    segments: Segments

    @classmethod
    def of(cls, run: Run, device: torch.device) -> "_Holding":
        """Load them from a run's folder.

        Raises:
            ConfigError: the run's server holds none, or joins parts of several clients.
        """
        expected_of(run)  # refuses those that are joined
        split = run.split
        if run.recipe.has_hops:
            raise ConfigError(
                f"--serve {run.path}: hops hold parts of this model, and requesters reach none of"
                " them: predict with the whole model where all parts lie"
            )
        if not split.cuts:
            raise ConfigError(
                f"--serve {run.path}: with --scheme {run.config.scheme} the server holds no part of"
                " the model: predict with the whole at the client"
            )
        segments = split.segments(Holder.SERVER, device)
        segments.load({n: usable(run, run.segment(n), None).state_dict() for n in segments})
        return cls(split, segments)


@dataclass
class _Requester:
    """One that is served."""

    name: str
    address: str  # as it came: a lost connection has none
    samples: int = 0
    since: float = field(default_factory=time.monotonic)  # it came, or had its last batch


class Service:
    """Serves the requesters of a network."""

    def __init__(
        self,
        network: ServerNetwork,
        holding: _Holding,
        offer: Offer,
        most: int,
        address: str = "",
        title: str = "",
    ) -> None:
        """``most``: requesters at once; ``address``: where it listens; ``title``: for the user."""
        self.address, self.title = address, title
        self._network, self._holding, self._offer, self._most = network, holding, offer, most
        self._talks: dict[Member, Conversation[None]] = {}
        self._served: dict[Member, _Requester] = {}
        self._here: set[Member] = set()
        self._numbers: Iterator[int] = itertools.count(1)
        self._total = 0

    def run(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Serve until interrupted, or until ``is_over``, which is asked every ``POLL_S``."""
        network = self._network
        try:
            while not is_over():
                network.wait_until(network.ready_members, POLL_S)
                ready = network.ready_members()
                self._here = set(network.members)
                for member in ready:
                    if member in self._here:  # one that is just being added, next time
                        self._resume(member)
                self._drop_idle()
        finally:
            _tell(f"served {counted(self._total, 'sample')} in all")

    def _begin(self, member: Member) -> Conversation[None]:
        member.name = "server"
        holding = self._holding
        party = InferenceParty(
            holder=Holder.SERVER, link=member, split=holding.split, own_segments=holding.segments
        )

        def admit() -> None:
            if len(self._served) >= self._most:
                self._make_room()
            member.peer_name = f"requester_{next(self._numbers)}"
            self._served[member] = _Requester(member.peer_name, member.address)

        def count(size: int) -> None:
            requester = self._served[member]
            requester.samples += size
            requester.since = time.monotonic()
            self._total += size

        talk = self._talks[member] = server_serve(party, self._offer, admit, count)
        next(talk)
        return talk

    def _resume(self, member: Member) -> None:
        """Go on with a requester whose message has arrived, or who is gone."""
        talk = self._talks.get(member) or self._begin(member)
        try:
            next(talk)
        except StopIteration:
            self._end(member, "", MessageType.UNREGISTER)
        except HasClosed as error:  # as a closed tab leaves: no failure of one that was served
            self._end(member, "" if member in self._served else str(error), MessageType.UNREGISTER)
        except SflError as error:
            self._end(member, str(error), last_words_for(error))
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # of this one's batch
            self._end(member, f"cannot be served now: {reason_of(error)}", MessageType.TRY_AGAIN)

    def _make_room(self) -> None:
        """End the requester that has been longest without a batch.

        Raises:
            NotYet: all have had one just now.
        """
        member = min(self._served, key=lambda member: self._served[member].since)
        if time.monotonic() - self._served[member].since < IDLE_S:
            raise NotYet(f"{counted(self._most, 'requester')} are served: try again later")
        why = f"no batch for {IDLE_S:g} seconds, and others ask: connect again"
        self._end(member, why, MessageType.TRY_AGAIN)

    def _end(self, member: Member, why: str, last_words: MessageType) -> None:
        self._talks.pop(member, None)
        self._here.discard(member)
        requester = self._served.pop(member, None)
        if requester is None:
            self._network.log_refusal(member.address, why)
        else:
            self._say_ended(requester, why)
        self._network.drop(member, why, last_words)

    def _say_ended(self, requester: _Requester, why: str) -> None:
        """Say what a requester has had; of failures and empty visits only so many lines."""
        samples = f"{counted(requester.samples, 'sample')} for {requester.name}"
        if requester.samples and not why:
            _tell(f"{samples} at {requester.address} ({self._total} in all)")
        else:
            told = f"it was ended: {why}" if why else "it has left"
            self._network.log_refusal(requester.address, f"{samples}; {told}")

    def _drop_idle(self) -> None:
        for member in self._network.members:
            if not member.peer_name and member.age_s() > REGISTER_WITHIN_S:
                why = f"ask within {REGISTER_WITHIN_S:g} seconds"
                self._end(member, why, MessageType.TRY_AGAIN)


def _tell(line: str) -> None:
    """Write a line to the terminal, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        say(line)
