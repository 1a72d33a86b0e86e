"""Register a client and report its data: both ends.

::

    client (client_join)                             server (server_join)
    REGISTER {client_id, instance, fingerprint}  ->
                                                 <-  REGISTERED {client_id, config, round, ...}
                                                 or  GO_TO {host, port}: another rank of
                                                     the server serves this client
                                                 or  INVALID_MESSAGE: why not
    REQUEST_TO_START {samples, classes, ...}     ->  once its data are loaded
                                                 <-  MESSAGE: which clients are still missing
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfl import __version__
from sfl.config import RunConfig
from sfl.conversation.alignment import server_receive_ids
from sfl.conversation.report import DataReport, are_rounds, parse_report
from sfl.data.vertical import Ids
from sfl.environment import check_fingerprint
from sfl.errors import ConfigError, ProtocolError, Redirected, quoted
from sfl.nodes import HOST
from sfl.options import from_values
from sfl.wire.driver import Conversation
from sfl.wire.link import ANY_ID, CLIENT, Link, Peer, one_line
from sfl.wire.messages import Message, MessageType
from sfl.wire.seal import About, SealKey

SHORTEST_HEARTBEAT_S = 0.01


@dataclass(frozen=True)
class Joined:
    """A client that has joined and loaded its data."""

    client: int
    link: Link
    fingerprint: Mapping[str, str]
    data: DataReport
    ids: Ids | None = None  # of its samples, where they are to be aligned


def reports_of(joined: Mapping[int, Joined]) -> dict[int, DataReport]:
    """Return the clients' reports of their data."""
    return {k: client.data for k, client in joined.items()}


HERE, APART = "here", "apart"  # the fed server: in the main server's process, or behind a store


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a registration."""

    client: int
    run: RunConfig
    first_round: int  # the first that is not done
    resumed: bool = False  # the run was started before: the client's folder may exist
    fed: str = HERE  # where the fed server is: HERE, APART, or HOST:PORT
    task_servers: Mapping[str, str] = field(default_factory=dict)  # HOST:PORT, by further task
    rounds: tuple[int, ...] = ()  # of such a server: whose start lies there
    heartbeat_s: float = 0.0  # interval at which the server expects a client's messages
    known: frozenset[int] = frozenset()  # clients that have registered before
    # Links of the cuts between client and server, if hops stand between these, see ``wire.seal``.
    passing: frozenset[int] | None = None
    tells: Callable[[int], bool] = lambda client: True  # as ``Recipe.is_told_figures``
    caller: str = CLIENT  # the role of those who connect to this server, as ``Recipe.caller``
    seal: str = ""  # the server's public key for this connection, if they do
    sfl: str = __version__  # the server's version

    @property
    def roles(self) -> set[str]:
        """The roles of the servers of further tasks."""
        return {f"task:{name}" for name in self.task_servers}


def client_join(
    link: Link,
    wanted_id: int | None,
    fingerprint: Mapping[str, str],
    *,
    instance: str,
    heartbeat_s: float,
) -> Conversation[Welcome]:
    """Register, and return the server's answer.

    ``instance`` is a random id of this process: a reconnect with it is the same client. The server
    is asked to send a message every ``heartbeat_s``.

    Raises:
        Redirected: the server sends us to another one.
        ProtocolError: its answer is invalid.
    """
    wanted = ANY_ID if wanted_id is None else wanted_id
    content = {
        "client_id": wanted,
        "instance": instance,
        "heartbeat_s": heartbeat_s,
        "fingerprint": dict(fingerprint),
    }
    link.send_message_as_json(MessageType.REGISTER, content=content)
    yield link
    reply = link.receive_message_as_json(MessageType.REGISTERED, MessageType.GO_TO)
    check_stays(reply)
    return parse_welcome(link, reply, wanted)


def check_stays(reply: Message) -> None:
    """Check that a server's answer does not send us to another server.

    Raises:
        Redirected: it does.
        ProtocolError: to no place.
    """
    if reply.type is not MessageType.GO_TO:
        return
    host, port = reply.get("host", str), reply.get("port", int)
    if not (0 < port < 65536 and (not host or HOST.fullmatch(host))):
        raise ProtocolError(f"the server sends us to {quoted(host)}, port {port}")
    raise Redirected(host, port)


def parse_welcome(link: Link, reply: Message, wanted: int) -> Welcome:
    """Parse the answer to a client that asked for the id ``wanted``, or ``ANY_ID``.

    Raises:
        ProtocolError: the answer is invalid.
    """
    try:
        run = from_values(RunConfig, reply.get("config", dict), "the server's configuration")
    except ConfigError as error:
        raise ProtocolError(str(error)) from error
    client = reply.get("client_id", int)
    if client != wanted and wanted != ANY_ID:
        raise ProtocolError(f"the server made us client {client} instead of {wanted}")
    if link.proved_run not in ("", run.run):
        raise ProtocolError(f"the server has proved to have the run {quoted(link.proved_run, 80)}")
    if not run.run or not 0 <= client < run.most_clients:
        raise ProtocolError(f"the server made us client {client} of the run {run.run!r}")
    if not 0 <= (first_round := reply.get("round", int)) <= run.rounds:
        raise ProtocolError(f"the server goes on with round {first_round + 1} of {run.rounds}")
    link.heartbeat_s = parse_heartbeat(reply)
    resumed, fed, version = reply.get("goes_on", bool), reply.get("fed", str), reply.get("sfl", str)
    seal, others = reply.get("seal", str), reply.get("task_servers", dict)
    rounds = reply.get("rounds", list)
    if not all(type(address) is str for address in others.values()) or not are_rounds(rounds):
        raise ProtocolError("the server's answer is no welcome")
    return Welcome(
        client, run, first_round, resumed, fed, others, tuple(rounds), seal=seal,
        sfl=one_line(version, 40),
    )  # fmt: skip


def parse_heartbeat(message: Message) -> float:
    """Return the heartbeat interval in seconds that a peer asks for.

    Raises:
        ProtocolError: it is out of range.
    """
    if not SHORTEST_HEARTBEAT_S <= (seconds := message.get("heartbeat_s", float)) < math.inf:
        raise ProtocolError(f"a heartbeat every {seconds} seconds makes no sense")
    return seconds


def server_join(
    link: Link,
    welcome: Welcome,
    take_id: Callable[[int, str], int],
    answer_check: Callable[[Message], Conversation[None]],
    *,
    claim_error: Callable[[Joined], str] | None = None,
    elsewhere: Callable[[int], Mapping[str, Any] | None] = lambda wanted: None,
    secret: bytes = b"",
) -> Conversation[Joined | None]:
    """Register one client and wait until its data are loaded.

    Return None if it only checked, or was sent to another rank.

    ``take_id`` assigns an id, given the wanted one and the client's instance, or raises
    ``RunError`` to refuse the client. The rest of ``welcome`` is the same for all clients.
    ``claim_error``: where clients' samples are aligned (``Recipe.aligns``), returns why a report is
    refused before the ids of its samples are asked for. ``elsewhere``: returns where a client goes
    that wants this id, or ``ANY_ID``; None: it stays here. ``secret``: what clients and server know
    and hops do not.
    """
    yield link
    hello = link.receive_message_as_json(MessageType.REGISTER, MessageType.CHECK)
    wanted, fingerprint = parse_hello(link, hello, callers_of(hello, welcome))
    if (place := elsewhere(wanted)) is not None:
        link.send_message_as_json(MessageType.GO_TO, content=dict(place))
        return None
    if hello.type is MessageType.CHECK:
        yield from answer_check(hello)
        return None
    if not re.fullmatch(r"[0-9a-f]{32}", instance := hello.get("instance", str)):
        raise ProtocolError("a client does not say which process it is")
    link.heartbeat_s = parse_heartbeat(hello)
    client = take_id(wanted, instance)
    link.peer_name = f"client_{client}"
    key = None if welcome.passing is None else SealKey()
    welcome = replace(welcome, seal=key.public if key else "")
    link.send_message_as_json(MessageType.REGISTERED, content=welcome_content(client, welcome))
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START)
    if key and welcome.passing is not None:
        about = About(
            welcome.run.run, client, is_client=False, passing=welcome.passing,
            has_figures=welcome.tells(client),
        )  # fmt: skip
        link.seal = key.agree(message.get("seal", str), about, secret)
    aligns = claim_error is not None
    report = parse_report(message, client, welcome.run, aligns=aligns)
    joined = Joined(client, link, fingerprint, report)
    if claim_error is None:
        return joined
    if why := claim_error(joined):
        raise ProtocolError(f"client_{client} {why}")
    return replace(joined, ids=(yield from server_receive_ids(link, report.num_samples)))


def instance_at(instance: str, kind: str) -> str:
    """Return what a client shows another kind of server than the main one as its instance.

    Whoever knows the instance itself can take the client's place at the main server.
    """
    return hashlib.sha256(f"{instance}:{kind}".encode()).hexdigest()[: len(instance)]


@dataclass(frozen=True)
class AskedAbout:
    """A client that the server of a further task asks the main server about."""

    task: str
    instance: str  # as the client shows it there

    @classmethod
    def of(cls, hello: Message) -> "AskedAbout | None":
        """Return the client that a first message asks about, if it does."""
        asks = hello.type is MessageType.CHECK and isinstance(hello.content, dict)
        if not (asks and "task" in hello.content):
            return None
        return cls(hello.get("task", str), hello.get("instance", str))

    def is_of(self, instance: str) -> bool:
        """Return whether the client is of this instance."""
        return self.instance == instance_at(instance, f"task {self.task}")


def callers_of(hello: Message, welcome: Welcome) -> Collection[str]:
    """Return the roles of those who may send the server this first message."""
    about = AskedAbout.of(hello)
    return {f"task:{about.task}"} & welcome.roles if about else {welcome.caller}


def parse_hello(
    link: Link, hello: Message, callers: Collection[str]
) -> tuple[int, Mapping[str, str]]:
    """Return the id that a client asks for, and its fingerprint.

    ``callers``: the roles of those who connect here: the clients', that of the hop before us, those
    of the servers of further tasks.

    Raises:
        ProtocolError: its token belongs to another party, or the message is invalid.
    """
    wanted = hello.get("client_id", int)
    if link.proved and link.proved.role not in callers:
        due = " or ".join(sorted(callers))
        raise ProtocolError(
            f"{link.proved} connects where a {due} should: see --topology, --server and --next"
        )
    if link.proved:
        link.check_proved(Peer(link.proved.role, wanted))
    try:
        return wanted, check_fingerprint(hello.get("fingerprint", dict))
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def welcome_content(client: int, welcome: Welcome) -> dict[str, Any]:
    """Return the content of a client's welcome."""
    return {
        "client_id": client,
        "config": dataclasses.asdict(welcome.run),
        "round": welcome.first_round,
        "goes_on": welcome.resumed or client in welcome.known,
        "fed": welcome.fed,
        "task_servers": dict(welcome.task_servers),
        "rounds": list(welcome.rounds),
        "heartbeat_s": welcome.heartbeat_s,
        "seal": welcome.seal,
        "sfl": welcome.sfl,
    }
