"""TLS, by the standard library: what server and clients show, and whom they trust."""

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import ConfigError
from sfl.nodes import PeerNode, ServerNode


def certificate_hash(der: bytes) -> bytes:
    """Return the hash by which a proof names a server's certificate."""
    return hashlib.sha256(der).digest()


@dataclass(frozen=True)
class ServerTls:
    """TLS as a server offers it."""

    context: ssl.SSLContext
    certificate: bytes  # its hash


def server_tls(node: ServerNode) -> ServerTls | None:
    """Return how a server speaks TLS; None if it does not.

    Raises:
        ConfigError: its certificate or key cannot be used.
    """
    if not node.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # sessions are not resumed
    _own_certificate(context, node)
    if node.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        _trust(context, "--tls-client-ca", node.tls_client_ca)
    try:
        text = Path(node.tls_cert).expanduser().read_text("ascii")
        first = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
        der = ssl.PEM_cert_to_DER_cert(first)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tls-cert {node.tls_cert}: cannot be read: {error}") from error
    return ServerTls(context, certificate_hash(der))


_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def client_tls(node: PeerNode) -> ssl.SSLContext | None:
    """Return how a client, or a main server to its fed server, speaks TLS; None if it does not.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    if not node.tls_ca:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks the host's name
    _trust(context, "--tls-ca", node.tls_ca)
    if node.tls_cert:
        _own_certificate(context, node)
    return context


def _own_certificate(context: ssl.SSLContext, node: PeerNode) -> None:
    def encrypted() -> str:
        raise ConfigError(f"--tls-key {node.tls_key}: is encrypted; nobody is there to decrypt it")

    context.minimum_version = ssl.TLSVersion.TLSv1_3
    cert, key = (Path(p).expanduser() for p in (node.tls_cert, node.tls_key))
    try:
        context.load_cert_chain(cert, key, password=encrypted)
    except OSError as error:  # an SSLError is one as well
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError(
            f"--tls-cert {node.tls_cert}, --tls-key {node.tls_key}: cannot be used: {reason}"
        ) from error


def _trust(context: ssl.SSLContext, option: str, path: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(Path(path).expanduser())
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError(f"{option} {path}: no certificates can be read: {reason}") from error
