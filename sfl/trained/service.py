"""``run_server.py --serve RUN``: hold the server's segments of a trained model for requesters.

All of them are served by one thread, a batch of each in turn. One that breaks the protocol or
fails is ended alone; the service goes on until it is told to stop.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sfl.archive.run_folder import say
from sfl.config import RunConfig
from sfl.conversation.inference import InferenceParty, Offer, server_serve
from sfl.conversation.limits import inference_limits
from sfl.environment import set_up_torch
from sfl.errors import ConfigError, NotYet, SflError, counted
from sfl.interactive.run import Run
from sfl.model.topology import Holder, Segments
from sfl.nodes import ServerNode
from sfl.runtime.lobby import POLL_S, REGISTER_WITHIN_S
from sfl.runtime.memory import memory_limit_bytes
from sfl.strategy.split_model import SplitModel
from sfl.trained.inputs import expected_of
from sfl.trained.models import run_of
from sfl.transport.guard import Terms, exposure, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import SERVER
from sfl.transport.transports import TCP, ServerNetwork, Transport
from sfl.wire.driver import Conversation
from sfl.wire.link import last_words_for
from sfl.wire.members import Member
from sfl.wire.messages import MessageType

MOST_REQUESTERS = 500  # at once
# Of a requester: messages that are read ahead, one that is computed with, and its answer.
FILES_EACH = 6


def serve_model(run: RunConfig, node: ServerNode, transport: Transport = TCP) -> None:
    """Serve the back of the run in the folder ``node.serve``, until interrupted.

    Raises:
        ConfigError: options of training are given, or the run's server holds nothing.
        RunError: the port or the folder cannot be used.
    """
    if run != RunConfig():
        raise ConfigError("--serve: the model is trained; leave out the options of a run")
    guard = guard_of(node, SERVER, MOST_REQUESTERS)
    served = run_of(node.serve, {"threads": node.threads, "allow_import": node.allow_import})
    holding = _Holding.of(served, set_up_torch(node))
    guard = dataclasses.replace(guard, run=served.config.run)
    terms = Terms(node.peer_timeout, heartbeat_s=interval_s(node.peer_timeout))
    with (
        transport.listen(node.host, node.port, node.link_shape) as listener,
        transport.serve(listener, terms, guard, RefusalLog(say)) as network,
    ):
        most = most_requesters(holding.split, memory_limit_bytes(node))
        offer = Offer(served.config.run, served.last_round(), network.heartbeat_s)
        say(
            f"run {offer.run}, as after round {offer.round + 1} of {served.config.rounds}:"
            f" listening on {listener.address} with the {' and '.join(holding.segments)} of"
            f" {holding.split.recipe.title}, for {counted(most, 'requester')} at once"
        )
        for line in exposure(node):
            say(line)
        Service(network, holding, offer, most).run()


def most_requesters(split: SplitModel, limit_bytes: int) -> int:
    """Return how many requesters fit into so much memory at once.

    Raises:
        ConfigError: not one does.
    """
    largest = max(inference_limits(split, Holder.SERVER).payload_bytes.values())
    most = min(MOST_REQUESTERS, limit_bytes // (FILES_EACH * largest))
    if not most:
        raise ConfigError(
            f"--memory-limit: one requester needs {FILES_EACH * largest / 1e6:,.0f} MB for its"
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
        if not split.cuts:
            raise ConfigError(
                f"--serve {run.path}: with --scheme {run.config.scheme} the server holds no part of"
                " the model: predict with the whole at the client"
            )
        segments = split.segments(Holder.SERVER, device)
        segments.load({name: run.segment(name).state_dict() for name in segments})
        return cls(split, segments)


class Service:
    """Serves the requesters of a network."""

    def __init__(self, network: ServerNetwork, holding: _Holding, offer: Offer, most: int) -> None:
        """``most``: requesters at once."""
        self._network, self._holding, self._offer, self._most = network, holding, offer, most
        self._talks: dict[Member, Conversation[None]] = {}
        self._samples: dict[Member, int] = {}  # of the admitted requesters
        self._numbers: Iterator[int] = itertools.count(1)
        self._total = 0

    def run(self) -> None:
        """Serve until interrupted."""
        network = self._network
        try:
            while True:
                network.wait_until(network.ready_members, POLL_S)
                for member in network.ready_members():
                    if member in network.members:  # one that is just being added, next time
                        self._resume(member)
                self._drop_idle()
        finally:
            say(f"served {counted(self._total, 'sample')} in all")

    def _begin(self, member: Member) -> Conversation[None]:
        member.name = "server"
        holding = self._holding
        party = InferenceParty(
            holder=Holder.SERVER, link=member, split=holding.split, own_segments=holding.segments
        )

        def admit() -> None:
            if len(self._samples) >= self._most:
                raise NotYet(f"{counted(self._most, 'requester')} are served: try again later")
            member.peer_name, self._samples[member] = f"requester_{next(self._numbers)}", 0

        def count(size: int) -> None:
            self._samples[member] += size
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
        except SflError as error:
            self._end(member, str(error), last_words_for(error))

    def _end(self, member: Member, why: str, last_words: MessageType) -> None:
        self._talks.pop(member, None)
        samples = self._samples.pop(member, None)
        if samples is None:
            self._network.log_refusal(member.address, why)
        else:
            told = f"; it was ended: {why}" if why else ""
            served = f"{counted(samples, 'sample')} for {member.peer_name} at {member.address}"
            say(f"{served}{told} ({self._total} in all)")
        self._network.drop(member, why, last_words)

    def _drop_idle(self) -> None:
        for member in self._network.members:
            if not member.peer_name and member.age_s() > REGISTER_WITHIN_S:
                why = f"ask within {REGISTER_WITHIN_S:g} seconds"
                self._end(member, why, MessageType.TRY_AGAIN)
