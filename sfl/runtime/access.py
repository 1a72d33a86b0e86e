"""A client's way to the weights: over its connection, to a fed server, or through a store."""

import contextlib
import json
import shlex
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
from sfl.transport.certificates import client_tls
from sfl.transport.connection import Connection
from sfl.transport.dialling import connect, parse_address
from sfl.transport.heartbeat import Heart, interval_s
from sfl.transport.tokens import FED, Tokens, client_authenticate, tokens_of
from sfl.weights.exchange import SocketWeights, WeightKey, WeightStore
from sfl.weights.objects import ObjectStore
from sfl.weights.stores import SOCKET, StoreOptions, store_maker
from sfl.wire.driver import Conversation, run_blocking
from sfl.wire.link import CLIENT, Aside, Link, Peer
from sfl.wire.messages import Limits, MessageType


@dataclass(frozen=True)
class Access:
    """What a machine that connects has to show, and whom it trusts."""

    tokens: Tokens | None = None
    tls: ssl.SSLContext | None = None
    # Entered while a client waits, once it is registered, which is to be done in time: others of
    # the process may compute.
    aside: Aside = contextlib.nullcontext

    @classmethod
    def of(cls, node: PeerNode) -> "Access":
        """Return what a node's options name.

        Raises:
            ConfigError: a file of theirs cannot be used.
        """
        return cls(tokens_of(node), client_tls(node))

    def show(self, link: Link, peer: Peer, listener: str, run: str = "") -> None:
        """Show who we are, if we have a token, and see who listens; ``run`` is what it must have.

        Raises:
            ConfigError, AuthError: as ``client_authenticate``.
        """
        if self.tokens is not None:
            talk = client_authenticate(link, self.tokens, peer, listener=listener, run=run)
            link.proved_run = run_blocking(talk)


def reach(
    address: str, node: ClientNode, access: Access, again_s: float | None = None
) -> Connection:
    """Connect to a server, with this node's patience; no files are accepted yet.

    ``again_s`` is for how long to try, if it was there before.

    Raises:
        ConfigError: it is no address.
        RunError: nobody is there.
        AuthError, ConnectionLost: as ``connect``.
    """
    host, port = parse_address(address)
    connection = connect(
        host,
        port,
        timeout_s=node.peer_timeout,
        connect_timeout_s=again_s or node.connect_timeout,
        again=again_s is not None,
        limits=Limits(),
        on_wait=say,
        tls=access.tls,
        shape=node.link_shape,
    )
    connection.on_notice = say
    return connection


@contextlib.contextmanager
def hearing_why(connection: Connection) -> Iterator[None]:
    """Tell the server why we end; when it is the one that left, find out why."""
    try:
        yield
    except PeerFailed:
        raise
    except ConnectionLost as error:
        if why := connection.last_words():
            raise why from error
        raise
    except BaseException as error:
        connection.dismiss(last_words_of(error), reason_of(error))
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


@contextlib.contextmanager
def open_store(
    connection: Connection,
    welcome: Welcome,
    node: ClientNode,
    access: Access,
    folder: RunFolder,
    report: DataReport,
    fingerprint: Mapping[str, str],
    instance: str,
    most_bytes: int,
) -> Iterator[tuple[WeightStore, Connection | None]]:
    """Open a client's store; also return the connection to a fed server, if there is one.

    A file of weights has at most ``most_bytes``.

    Raises:
        ConfigError: the server names a place that this client does not allow.
        RunError: the place or the fed server cannot be used.
    """
    run = welcome.run
    if run.weights == SOCKET and node.allow_weights:
        raise ConfigError(
            f"--allow-weights {node.allow_weights}: but the server has the weights sent to it"
        )
    if run.weights == SOCKET and welcome.fed in (HERE, APART):
        if node.fed_server:
            raise ConfigError(f"--fed-server {node.fed_server}: but the server is that as well")
        yield SocketWeights(connection), None
    elif run.weights == SOCKET:
        with _fed_connection(welcome, node, access, folder, fingerprint, instance) as fed:
            yield _FromFed(SocketWeights(fed)), fed
    else:
        address = allowed_address(run.weights, node.allow_weights)
        options = StoreOptions(
            address, folder.path / "downloads", node.weights_timeout, node.weights_timeout, say
        )
        place = options.open_place()
        assert place is not None
        place.check()
        _sign_in(place, run, welcome.client, report)
        folder.events.say(f"weights go through {place.title}")
        link = connection if welcome.fed == HERE else None
        yield store_maker(place, options, aside=access.aside)(link, most_bytes), None


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


@contextlib.contextmanager
def _fed_connection(
    welcome: Welcome,
    node: ClientNode,
    access: Access,
    folder: RunFolder,
    fingerprint: Mapping[str, str],
    instance: str,
) -> Iterator[Connection]:
    """Register at the fed server, and take our leave there at the end.

    Our report is the caller's to send, once the main server has begun the run: it may refuse us.
    """
    with contextlib.ExitStack() as stack:
        with access.aside():  # who connects has to register soon
            connection = stack.enter_context(reach(node.fed_server or welcome.fed, node, access))
            connection.name, connection.peer_name = f"client_{welcome.client}", "the fed server"
            stack.enter_context(hearing_why(connection))
            access.show(connection, Peer(CLIENT, welcome.client), FED, welcome.run.run)
            joining = client_join(
                connection, welcome.client, fingerprint, instance=instance,
                heartbeat_s=interval_s(node.peer_timeout),
            )  # fmt: skip
            theirs = run_blocking(joining)
        if (theirs.run, theirs.first_round) != (welcome.run, welcome.first_round):
            raise ProtocolError("the fed server runs another run than the main server")
        connection.aside = access.aside
        with Heart(lambda: [connection]):
            folder.events.say(f"the fed server is at {welcome.fed}")
            yield connection
        connection.send_message_as_json(MessageType.UNREGISTER)
        connection.part()


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
