"""TLS contexts of the standard library: own certificates, and trusted ones."""

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import ConfigError
from sfl.nodes import PeerNode, ServerNode


def certificate_hash(der: bytes) -> bytes:
    """Return the hash of a certificate; proofs of a token include the server's."""
    return hashlib.sha256(der).digest()


@dataclass(frozen=True)
class ServerTls:
    """A server's TLS context and certificate."""

    context: ssl.SSLContext
    certificate: bytes  # its hash


def server_tls(node: ServerNode) -> ServerTls | None:
    """Return a server's TLS by its options; None without ``--tls-cert``.

    Raises:
        ConfigError: its certificate or key cannot be used.
    """
    if not node.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # sessions are not resumed
    _load_certificate(context, node)
    if node.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_ca(context, "--tls-client-ca", node.tls_client_ca)
    try:
        text = Path(node.tls_cert).expanduser().read_text("ascii")
        first = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
        der = ssl.PEM_cert_to_DER_cert(first)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tls-cert {node.tls_cert}: cannot be read: {error}") from error
    return ServerTls(context, certificate_hash(der))


_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def client_tls(node: PeerNode) -> ssl.SSLContext | None:
    """Return the TLS context of a client, or of a main server to its fed server; None without one.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    if not node.tls_ca:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the host name
    _load_ca(context, "--tls-ca", node.tls_ca)
    if node.tls_cert:
        _load_certificate(context, node)
    return context


def trusted_by_system() -> ssl.SSLContext:
    """Return the context of a client that trusts the CAs that this machine does."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _load_certificate(context: ssl.SSLContext, node: PeerNode) -> None:
    def encrypted() -> str:
        raise ConfigError(
            f"--tls-key {node.tls_key}: is encrypted: give a key without a passphrase"
        )

    context.minimum_version = ssl.TLSVersion.TLSv1_3
    cert, key = (Path(p).expanduser() for p in (node.tls_cert, node.tls_key))
    try:
        context.load_cert_chain(cert, key, password=encrypted)
    except OSError as error:  # includes SSLError
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError(
            f"--tls-cert {node.tls_cert}, --tls-key {node.tls_key}: cannot be used: {reason}"
        ) from error


def _load_ca(context: ssl.SSLContext, option: str, path: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(Path(path).expanduser())
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise ConfigError(f"{option} {path}: no certificates can be read: {reason}") from error
