"""Whom a server lets in, and whether it is open to everybody by mistake."""

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
FILES_WANTED = 8192  # open at once: a connection is one


@dataclass(frozen=True)
class Terms:
    """What a server's connections have in common."""

    timeout_s: float
    limits: Limits = field(
        default_factory=Limits
    )  # no files from anybody before the model is known
    max_strangers: int = 64  # that may be connected without having registered
    heartbeat_s: float = 0.0  # how often to hear from who has registered; 0: as timeout_s asks


@dataclass
class Guard:
    """Who is let in."""

    tokens: Tokens | None = None
    tls: ServerTls | None = None
    listener: str = SERVER  # what we are
    run: str = ""  # that we have, once it is known
    max_pending: int = 64


def guard_of(node: ServerNode, listener: str, most_clients: int = 0) -> Guard:
    """Return whom a server lets in, after seeing that it is not open to everybody by mistake.

    Raises:
        ConfigError: it would be, or a file of tokens or certificates cannot be used.
    """
    tokens, tls = tokens_of(node), server_tls(node)
    if tokens is None and not node.insecure and not is_loopback(node.host):
        raise ConfigError(
            f"--host {node.host}: whoever reaches the port could take part: give --token-file (make"
            " one: python -m sfl.auth new-token FILE), or --insecure if only friends can reach it"
        )
    # All clients at once, and again; a fed server does not know yet how many there are.
    crowd = node.max_pending or 64 + 2 * (most_clients or MOST_CLIENTS_OF_FED)
    return Guard(tokens, tls, listener, max_pending=min(crowd, most_files() // 2))


def exposure(node: ServerNode) -> list[str]:
    """Return what to say about who can reach a server."""
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
            f"warning: no --tls-cert: {protects}who is on the way can read and alter what travels"
        )
    return lines


def most_files() -> int:
    """Return how many files may be open at once, after asking for more if there are few."""
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
