"""Which connections a server admits, and checks that it is not open by mistake."""

import contextlib
import sys
from dataclasses import dataclass, field

from sfl.errors import ConfigError
from sfl.nodes import ServerNode
from sfl.transport.addresses import is_loopback
from sfl.transport.certificates import ServerTls, server_tls
from sfl.transport.tokens import SERVER, Tokens, tokens_of
from sfl.wire.messages import Limits

MOST_CLIENTS_OF_FED = 500
FILES_WANTED = 8192  # open at once; each connection is one


@dataclass(frozen=True)
class Terms:
    """Settings that all connections of a server share."""

    timeout_s: float
    limits: Limits = field(default_factory=Limits)  # no files before the model is known
    max_unregistered: int = 64  # connections that have not registered yet
    heartbeat_s: float = 0.0  # interval that registered peers are asked for; 0: from timeout_s


@dataclass
class Guard:
    """What a connection must do to be admitted."""

    tokens: Tokens | None = None
    tls: ServerTls | None = None
    listener: str = SERVER  # or FED: which kind of server this is
    run: str = ""  # this server's run; "" until it is known
    max_pending: int = 64  # connections that are not admitted yet
    websocket: bool = False  # whether a peer may open a WebSocket, and talk through it


def guard_of(node: ServerNode, listener: str, most_clients: int = 0) -> Guard:
    """Return a server's guard by its options.

    Raises:
        ConfigError: other machines could connect without a token and without ``--insecure``, or a
            file of tokens or certificates cannot be used.
    """
    tokens, tls = tokens_of(node), server_tls(node)
    if tokens is None and not node.insecure and not is_loopback(node.host):
        raise ConfigError(
            f"--host {node.host}: whoever reaches the port could take part: give --token-file (make"
            " one: python -m sfl.auth new-token FILE), or --insecure if only trusted peers reach it"
        )
    # Twice the number of clients, for reconnects; a fed server does not know it yet.
    crowd = node.max_pending or 64 + 2 * (most_clients or MOST_CLIENTS_OF_FED)
    return Guard(tokens, tls, listener, max_pending=min(crowd, max_open_files() // 2))


def exposure(node: ServerNode) -> list[str]:
    """Return lines for the user about who can reach a server."""
    if is_loopback(node.host):
        return ["only this machine can connect; --host 0.0.0.0 lets others"]
    lines = []
    if not node.token_file:
        lines.append("warning: --insecure: whoever reaches the port can take part in the run")
    if not node.tls_cert:
        protects = "a token protects the start of a connection, not what follows; " * bool(
            node.token_file
        )
        lines.append(
            f"warning: no --tls-cert: {protects}others on the way can read and alter what travels"
        )
    return lines


def max_open_files() -> int:
    """Raise the system's limit of open files to ``FILES_WANTED`` if it is lower; return it."""
    if sys.platform == "win32":
        return FILES_WANTED
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES_WANTED:
        wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft if soft >= 0 else FILES_WANTED
