"""A client's connection and authentication, and its store of weights."""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from sfl.archive.run_folder import RunFolder, say
from sfl.config import RunConfig
from sfl.conversation.join import APART, HERE, Welcome, client_join, instance_at
from sfl.conversation.report import DataReport
from sfl.errors import (
    RECURRING,
    ConfigError,
    ConnectionLost,
    Damaged,
    NotFinite,
    PeerFailed,
    ProtocolError,
    Redirected,
    RunError,
    SflError,
    quoted,
    reason_of,
)
from sfl.files.checksum import checksum
from sfl.files.torch_reader import Buffer
from sfl.nodes import ClientNode, PeerNode
from sfl.transport.addresses import format_address, parse_address
from sfl.transport.heartbeat import interval_s
from sfl.transport.tokens import FED, Tokens, client_authenticate, tokens_of
from sfl.weights.exchange import SocketWeights, WeightKey, WeightStore
from sfl.weights.object_store import ObjectStore
from sfl.weights.stores import SOCKET, StoreOptions, store_maker
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.link import CLIENT, Link, Peer
from sfl.wire.members import Channel, Dialler
from sfl.wire.messages import MessageType

T = TypeVar("T")
MOST_HOPS = 256  # from rank to rank of a server, for a client without an id


@dataclass(frozen=True)
class Access:
    """Connects and authenticates to servers, with this machine's tokens."""

    tokens: Tokens | None
    dialler: Dialler
    calls: Calls = field(default_factory=Calls)  # runs blocking calls beside hosted clients

    @classmethod
    def of(cls, node: PeerNode, dialler: Dialler) -> "Access":
        """Read the token file that a node's options name.

        Raises:
            ConfigError: the file cannot be used.
        """
        return cls(tokens_of(node), dialler)

    def authenticate(self, link: Link, peer: Peer, listener: str, run: str = "") -> None:
        """Authenticate both sides, if this machine has a token; ``run`` is the server's run.

        Raises:
            ConfigError, AuthError: as ``client_authenticate``.
        """
        if self.tokens is not None:
            talk = client_authenticate(link, self.tokens, peer, listener=listener, run=run)
            link.proved_run = run_blocking(talk)

    def connect(self, address: str, node: ClientNode, reconnect_s: float | None = None) -> Channel:
        """Connect to a server; files are refused until the caller sets limits.

        ``reconnect_s``: the timeout if the server was reached before; else ``connect_timeout``.

        Raises:
            ConfigError, RunError, AuthError, ConnectionLost: as ``Dialler.connect``.
        """
        patience_s = reconnect_s or node.connect_timeout
        channel = self.dialler.connect(address, patience_s, is_reconnect=reconnect_s is not None)
        channel.on_notice = say
        return channel

    def follow(self, address: str, attempt: Callable[[str], T]) -> T:
        """Return ``attempt(address)``, or that of the address to which a server sends us instead.

        Transport and path stay the same, and so do the checks of TLS and token.

        Raises:
            ProtocolError: servers send us on for ever.
        """
        for _ in range(MOST_HOPS):
            try:
                return attempt(address)
            except Redirected as error:
                address = moved(address, error)
        raise ProtocolError(f"servers have sent us on {MOST_HOPS} times, at last to {address}")


def moved(address: str, error: Redirected) -> str:
    """Return the address to which a server at ``address`` sends us."""
    named, mark, rest = address.rpartition("://")
    before, slash, path = rest.partition("/")
    host = error.host or parse_address(before)[0]
    return f"{named}{mark}{format_address(host, error.port)}{slash}{path}"


@dataclass(frozen=True)
class Registered:
    """A client's registration over one channel."""

    link: Channel
    welcome: Welcome
    instance: str  # the client's random id
    fingerprint: Mapping[str, str]
    reconnect_s: float | None = None  # timeout to reach the servers again, if they were before


@contextlib.contextmanager
def closing_with_reason(channel: Channel) -> Iterator[None]:
    """On failure send the server our reason, or raise the reason it sent; then close."""
    try:
        yield
    except BaseException as error:
        with channel:
            if isinstance(error, PeerFailed):
                raise
            if not isinstance(error, ConnectionLost):
                channel.dismiss(closing_message_type(error), reason_of(error))
            elif why := channel.last_words():
                raise why from error
            raise


def closing_message_type(error: BaseException) -> MessageType:
    """Return the type of a client's closing message, by whether another attempt may succeed."""
    if isinstance(error, KeyboardInterrupt | GeneratorExit | Damaged):  # the client may return
        return MessageType.UNREGISTER
    if isinstance(error, ProtocolError) and not isinstance(error, NotFinite):
        return MessageType.INVALID_MESSAGE
    is_own_failure = isinstance(error, SflError | OSError | MemoryError)
    if isinstance(error, RECURRING) or not is_own_failure:  # faulty code fails again
        return MessageType.FAILED
    return MessageType.ABORT


@dataclass(frozen=True)
class StoreAccess:
    """Opens the store of weights of one registration."""

    node: ClientNode
    access: Access
    folder: RunFolder
    registered: Registered
    report: DataReport

    def open(
        self, stack: contextlib.ExitStack, most_bytes: int
    ) -> Conversation[tuple[WeightStore, Channel | None]]:
        """Open the store; also return the channel to a fed server, if there is one.

        ``stack`` closes the channel; a file of weights has at most ``most_bytes``.

        Raises:
            ConfigError: the server names a store that this client does not allow.
            RunError: the store or the fed server cannot be used.
        """
        run, fed, node = self.registered.welcome.run, self.registered.welcome.fed, self.node
        link = self.registered.link
        if run.weights != SOCKET:
            maker = yield from self.access.calls.run(self._open_place)
            return maker(link if fed == HERE else None, most_bytes), None
        if node.allow_weights:
            raise ConfigError(
                f"--allow-weights {node.allow_weights}: but the server has the weights sent to it"
            )
        if fed not in (HERE, APART):
            channel = yield from self.access.calls.run(self._join_fed)
            stack.enter_context(channel)
            stack.enter_context(closing_with_reason(channel))
            self.folder.events.say(f"the fed server is at {fed}")
            return _FedServerWeights(SocketWeights(channel)), channel
        if node.fed_server:
            raise ConfigError(f"--fed-server {node.fed_server}: but the server is that as well")
        return SocketWeights(link), None

    def _open_place(self) -> Callable[[Link | None, int], WeightStore]:
        """Open the folder or bucket that the run's weights go through."""
        run, timeout_s = self.registered.welcome.run, self.node.weights_timeout
        address = allowed_address(run.weights, self.node.allow_weights)
        options = StoreOptions(address, self.folder.path / "downloads", timeout_s, timeout_s, say)
        place = options.open_place()
        assert place is not None
        place.check()
        _write_probe(place, run, self.registered.welcome.client, self.report)
        self.folder.events.say(f"weights go through {place.title}")
        return store_maker(place, options, self.access.calls.wake)

    def _join_fed(self) -> Channel:
        """Register at the fed server.

        The caller sends the report when the main server has started the run, and so accepted it.
        """
        address = self.node.fed_server or self.registered.welcome.fed
        return join_another(self.access, self.node, self.registered, address, FED).link


def join_another(
    access: Access, node: ClientNode, registered: Registered, address: str, kind: str
) -> Registered:
    """Register at a server beside the main one; ``kind``: in a token's proofs.

    Raises:
        ProtocolError: it has another run.
    """
    welcome, title = registered.welcome, f"the {kind} server"
    channel = access.connect(address, node, registered.reconnect_s)
    channel.name, channel.peer_name = f"client_{welcome.client}", title
    with closing_with_reason(channel):
        access.authenticate(channel, Peer(CLIENT, welcome.client), kind, welcome.run.run)
        joining = client_join(
            channel,
            welcome.client,
            registered.fingerprint,
            instance=instance_at(registered.instance, kind),
            heartbeat_s=interval_s(node.peer_timeout),
        )
        theirs = run_blocking(joining)
        if (theirs.run, theirs.first_round) != (welcome.run, welcome.first_round):
            raise ProtocolError(f"{title} runs another run than the main server")
    return Registered(channel, theirs, registered.instance, registered.fingerprint)


def allowed_address(named: str, allowed: str) -> str:
    """Return this client's address of the store that a server names.

    Paths and recipients of a client's weights are chosen by its command line, not by the server.

    Raises:
        ConfigError: the client's command line does not allow the store.
    """
    if named.startswith("dir:") and allowed.startswith("dir:"):
        return allowed  # this machine's path of the shared folder
    inside = allowed and f"{named.rstrip('/')}/".startswith(f"{allowed.rstrip('/')}/")
    if not inside:
        raise ConfigError(
            f"the server lets the weights go through {quoted(named, 200)}, which this client does"
            f" not allow; if you trust that place, give --allow-weights {shlex.quote(named)}"
        )
    return named


def _write_probe(place: ObjectStore, run: RunConfig, client: int, report: DataReport) -> None:
    """Write an object, which shows that this client has write access."""
    content = json.dumps({"client": client, "data": report.digest}).encode()
    about = {"run": run.run, "client": str(client), "checksum": checksum(content)}
    path = f"{run.run}/clients/client_{client}_{report.digest[:16]}"  # other data, another object
    place.create(path, content, about)


@dataclass(frozen=True)
class _FedServerWeights:
    """Weights over the fed server's connection; its failures are reported to the main server."""

    store: WeightStore

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        with _as_own_failure():
            yield from self.store.put(key, data, samples)

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        with _as_own_failure():
            yield from self.store.pass_on(key, data)

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        with _as_own_failure():
            return (yield from self.store.get(key, held))


@contextlib.contextmanager
def _as_own_failure() -> Iterator[None]:
    """Raise the fed server's failure as ``RunError``, which the main server is told."""
    try:
        yield
    except (ConnectionLost, PeerFailed) as error:
        raise RunError(str(error)) from error
