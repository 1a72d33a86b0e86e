"""The kinds of parties that follow the main server, as rows: hops, and servers of further tasks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfl.conversation.followed import FollowerJoined
from sfl.conversation.hop import hop_join, hop_run
from sfl.conversation.limits import hop_limits, task_limits
from sfl.conversation.party import ServerParty
from sfl.conversation.task_server import task_join, task_run
from sfl.model.topology import role_before
from sfl.strategy.split_model import SplitModel
from sfl.transport.tokens import SERVER
from sfl.wire.driver import Conversation
from sfl.wire.link import CLIENT
from sfl.wire.messages import Limits
from sfl.wire.payload import MakeStore


@dataclass(frozen=True)
class Kind:
    """What differs between hops and the servers of further tasks."""

    # role -> the conversation in which a client joins, with parameters as of ``hop_join``
    join: Callable[[str], Callable[..., Conversation[FollowerJoined | None]]]
    run: Callable[[ServerParty, Any], Conversation[None]]
    limits: Callable[[SplitModel, MakeStore], Limits]
    listener: Callable[[str], str]  # role -> kind of server in a token's proofs
    caller: Callable[[str], str]  # role -> the role of those who connect to it
    beyond: str  # what the next party is, for users
    only_asks: bool = False  # whether the connection to it ends when it has answered


HOP = Kind(lambda role: hop_join, hop_run, hop_limits, lambda role: SERVER, role_before, "on to")
TASK = Kind(
    lambda role: functools.partial(task_join, role.partition(":")[2]),
    task_run,
    task_limits,
    lambda role: role.replace(":", " "),
    lambda role: CLIENT,
    "the main server is at",
    True,
)


def kind_of(role: str) -> Kind:
    """Return the kind that ``--role`` names."""
    return HOP if role.startswith("hop:") else TASK
