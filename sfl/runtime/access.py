"""A client's way to the weights: over its connection, to a fed server, or through a store."""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from sfl.archive.run_folder import RunFolder, say
from sfl.config import RunConfig
from sfl.conversation.join import APART, HERE, DataReport, Welcome, client_join
from sfl.errors import (
    RECURRING,
    ConfigError,
    ConnectionLost,
    Damaged,
    NotFinite,
    PeerFailed,
    ProtocolError,
    RunError,
    SflError,
    quoted,
    reason_of,
)
from sfl.files.checksum import checksum
from sfl.files.torch_reader import Buffer
from sfl.nodes import ClientNode, PeerNode
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


@dataclass(frozen=True)
class Access:
    """What a machine that connects has to show, and how it connects."""

    tokens: Tokens | None
    dialler: Dialler
    calls: Calls = field(default_factory=Calls)  # that block, while other clients go on

    @classmethod
    def of(cls, node: PeerNode, dialler: Dialler) -> "Access":
        """Return what a node's options name.

        Raises:
            ConfigError: its file of tokens cannot be used.
        """
        return cls(tokens_of(node), dialler)

    def show(self, link: Link, peer: Peer, listener: str, run: str = "") -> None:
        """Show who we are, if we have a token, and see who listens; ``run`` is what it must have.

        Raises:
            ConfigError, AuthError: as ``client_authenticate``.
        """
        if self.tokens is not None:
            talk = client_authenticate(link, self.tokens, peer, listener=listener, run=run)
            link.proved_run = run_blocking(talk)

    def reach(self, address: str, node: ClientNode, again_s: float | None = None) -> Channel:
        """Connect to a server, with a node's patience; no files are accepted yet.

        ``again_s`` is for how long to try, if it was there before.

        Raises:
            ConfigError, RunError, AuthError, ConnectionLost: as ``Dialler.connect``.
        """
        patience_s = again_s or node.connect_timeout
        channel = self.dialler.connect(address, patience_s, is_reconnect=again_s is not None)
        channel.on_notice = say
        return channel


@dataclass(frozen=True)
class Registered:
    """A client's registration over one channel."""

    link: Channel
    welcome: Welcome
    instance: str  # of this process's client
    fingerprint: Mapping[str, str]


@contextlib.contextmanager
def hearing_why(channel: Channel) -> Iterator[None]:
    """On failure tell the server why we end, or find out why it has left; then close."""
    try:
        yield
    except BaseException as error:
        with channel:
            if isinstance(error, PeerFailed):
                raise
            if not isinstance(error, ConnectionLost):
                channel.dismiss(last_words_of(error), reason_of(error))
            elif why := channel.last_words():
                raise why from error
            raise


def last_words_of(error: BaseException) -> MessageType:
    """Return how a client says why it ends: whether another try may go better."""
    if isinstance(error, KeyboardInterrupt | Damaged):  # it may come back
        return MessageType.UNREGISTER
    if isinstance(error, ProtocolError) and not isinstance(error, NotFinite):
        return MessageType.INVALID_MESSAGE
    its_own_trouble = isinstance(error, SflError | OSError | MemoryError)
    if isinstance(error, RECURRING) or not its_own_trouble:  # code that fails does so again
        return MessageType.FAILED
    return MessageType.ABORT


@dataclass(frozen=True)
class StoreAccess:
    """A client's way to the weights, for one registration."""

    node: ClientNode
    access: Access
    folder: RunFolder
    registered: Registered
    report: DataReport

    def open(
        self, stack: contextlib.ExitStack, most_bytes: int
    ) -> Conversation[tuple[WeightStore, Channel | None]]:
        """Open the store; also return the channel to a fed server, if there is one.

        ``stack`` closes it; a file of weights has at most ``most_bytes``.

        Raises:
            ConfigError: the server names a place that this client does not allow.
            RunError: the place or the fed server cannot be used.
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
            stack.enter_context(hearing_why(channel))
            self.folder.events.say(f"the fed server is at {fed}")
            return _FromFed(SocketWeights(channel)), channel
        if node.fed_server:
            raise ConfigError(f"--fed-server {node.fed_server}: but the server is that as well")
        return SocketWeights(link), None

    def _open_place(self) -> Callable[[Link | None, int], WeightStore]:
        """Open the place that the run's weights go through."""
        run, timeout_s = self.registered.welcome.run, self.node.weights_timeout
        address = allowed_address(run.weights, self.node.allow_weights)
        options = StoreOptions(address, self.folder.path / "downloads", timeout_s, timeout_s, say)
        place = options.open_place()
        assert place is not None
        place.check()
        _sign_in(place, run, self.registered.welcome.client, self.report)
        self.folder.events.say(f"weights go through {place.title}")
        return store_maker(place, options, self.access.calls.wake)

    def _join_fed(self) -> Channel:
        """Register at the fed server.

        Our report is the caller's to send, once the main server has begun the run: it may refuse.
        """
        welcome, node, access = self.registered.welcome, self.node, self.access
        channel = access.reach(node.fed_server or welcome.fed, node)
        channel.name, channel.peer_name = f"client_{welcome.client}", "the fed server"
        with hearing_why(channel):
            access.show(channel, Peer(CLIENT, welcome.client), FED, welcome.run.run)
            joining = client_join(
                channel,
                welcome.client,
                self.registered.fingerprint,
                instance=self.registered.instance,
                heartbeat_s=interval_s(node.peer_timeout),
            )
            theirs = run_blocking(joining)
            if (theirs.run, theirs.first_round) != (welcome.run, welcome.first_round):
                raise ProtocolError("the fed server runs another run than the main server")
        return channel


def allowed_address(named: str, allowed: str) -> str:
    """Return the address of a store that a server names, as this client knows it.

    A server chooses neither a path nor whom a client's weights are given to: the client's own
    command line does.

    Raises:
        ConfigError: the client does not allow it.
    """
    if named.startswith("dir:") and allowed.startswith("dir:"):
        return allowed  # where this machine has that folder
    inside = allowed and f"{named.rstrip('/')}/".startswith(f"{allowed.rstrip('/')}/")
    if not inside:
        raise ConfigError(
            f"the server lets the weights go through {quoted(named, 200)}, which this client does"
            f" not allow; if you trust that place, give --allow-weights {shlex.quote(named)}"
        )
    return named


def _sign_in(place: ObjectStore, run: RunConfig, client: int, report: DataReport) -> None:
    """Write a first object: it shows that we may."""
    content = json.dumps({"client": client, "data": report.digest}).encode()
    about = {"run": run.run, "client": str(client), "checksum": checksum(content)}
    path = f"{run.run}/clients/client_{client}_{report.digest[:16]}"  # other data, another object
    place.create(path, content, about)


@dataclass(frozen=True)
class _FromFed:
    """A store over the connection to the fed server, which tells the main server when it fails."""

    store: WeightStore

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        with _failing():
            yield from self.store.put(key, data, samples)

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        with _failing():
            yield from self.store.pass_on(key, data)

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        with _failing():
            return (yield from self.store.get(key, held))


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Make of the fed server's failure one of ours, so that the main server hears of it."""
    try:
        yield
    except (ConnectionLost, PeerFailed) as error:
        raise RunError(str(error)) from error
