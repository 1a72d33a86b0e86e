"""Tokens: mutual authentication of server and clients by a shared secret.

When a client connects, each side proves that it has the token without sending it::

    client (client_authenticate)                  server (server_authenticate)
    AUTHENTICATE {role, client_id, nonce}     ->
                                              <-  CHALLENGE {run, nonce, proof}
    PROOF {proof}                             ->
    REGISTER, ...

A proof is the HMAC-SHA-256 (RFC 2104), keyed by the token, of the proving side, the protocol
version, the kind of server, role and client id, the run, both nonces and, under TLS, the hash of
the server's certificate. So an eavesdropper cannot replay it, here or elsewhere, and a client stops
if the server lacks the token. Tokens protect the start of a connection; only TLS protects the rest.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sfl.config import RUN_NAME
from sfl.errors import AuthError, ConfigError, ProtocolError, quoted
from sfl.nodes import TASK_NAME, PeerNode, ServerNode
from sfl.wire.driver import Conversation
from sfl.wire.framing import VERSION
from sfl.wire.link import ANY_ID, CLIENT, MAIN, Link, Peer
from sfl.wire.messages import MessageType

SERVER, FED = "server", "fed"  # the kinds of server
TOKEN_BYTES = 32
_TOKEN = re.compile(r"[!-~]{32,512}")
_ROLE = re.compile(rf"{CLIENT}|{MAIN}|hop:[1-9]|task:{TASK_NAME}")
_OWNER = re.compile(rf"0|[1-9]\d{{0,8}}|{MAIN}|hop:[1-9]|task:{TASK_NAME}")
_HEX = re.compile(r"[0-9a-f]{64}")  # 32 bytes: a nonce, a proof
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Tokens:
    """The content of a token file: one shared token, or one for each client."""

    path: Path
    shared: str = ""
    own: Mapping[str, str] | None = None  # keys: "0", "1", ..., "main", "hop:1", "task:parity"

    def of(self, peer: Peer) -> bytes | None:
        """Return a peer's token; None if it has none."""
        token = self.shared if self.own is None else self.own.get(peer.owner, "")
        return token.encode() or None

    @property
    def only_client(self) -> int | None:
        """The client of the file's only token; None if the file serves several."""
        owners = [owner for owner in self.own or {} if owner.isdecimal()]
        return int(owners[0]) if len(owners) == 1 else None


def read_tokens(path: Path) -> Tokens:
    """Return the content of a token file: a token, or lines of a client id and its token.

    Raises:
        ConfigError: it cannot be read, other users can access it, or it is malformed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            text = file.read(_MAX_FILE_BYTES).decode("ascii") if stat.S_ISREG(mode) else ""
    except OSError as error:
        raise ConfigError(f"--token-file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path}: is not ASCII text") from None
    if mode & 0o077:
        raise ConfigError(
            f"--token-file {path}: other users of this machine may read or change it; say"
            f" chmod 600 {path}"
        )
    return _parse(path, [line.split() for line in text.splitlines() if line[:1] not in ("", "#")])


def _parse(path: Path, lines: list[list[str]]) -> Tokens:
    wrong = ConfigError(
        f"--token-file {path}: holds neither one token nor lines of a client's id and its token,"
        f" each token of 32 characters or more; make one: python -m sfl.auth new-token {path}"
    )
    if not all(_TOKEN.fullmatch(line[-1]) for line in lines):
        raise wrong
    match lines:
        case [[token]]:
            return Tokens(path, token)
        case [[_, _], *_] if all(len(line) == 2 and _OWNER.fullmatch(line[0]) for line in lines):
            own = {owner: token for owner, token in lines}
            if len(own) == len(lines) == len(set(own.values())):
                return Tokens(path, own=own)
    raise wrong


def tokens_of(node: PeerNode) -> Tokens | None:
    """Return the tokens of a node's ``--token-file``, if any."""
    return read_tokens(Path(node.token_file).expanduser()) if node.token_file else None


def next_tokens_of(node: ServerNode) -> Tokens | None:
    """Return the file of the token that a hop shows to the next party, if any.

    Raises:
        ConfigError: it holds none for a hop, or cannot be used.
    """
    file = node.next_token_file
    tokens = read_tokens(Path(file).expanduser()) if file else tokens_of(node)
    if tokens and tokens.of(Peer(node.role)) is None:
        raise ConfigError(
            f"--role {node.role}: {tokens.path} has tokens of clients; give --next-token-file with"
            " the one that the next party's --token-file shares with this hop"
        )
    return tokens


def seal_secret(node: PeerNode) -> bytes:
    """Return the secret of a node's ``--seal-file``; empty without one.

    Raises:
        ConfigError: the file holds none, or cannot be used.
    """
    if not node.seal_file:
        return b""
    if secret := read_tokens(Path(node.seal_file).expanduser()).shared:
        return secret.encode()
    raise ConfigError(f"--seal-file {node.seal_file}: give one secret for server and all clients")


def write_tokens(path: Path, lines: list[str]) -> None:
    """Write a new token file that only its owner may read.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


# The handshake


def _proof(token: bytes, side: str, agreed: tuple[str | bytes, ...]) -> str:
    """Return one side's proof that it has a token; each field is prefixed by its length."""
    code = hmac.new(token, digestmod=hashlib.sha256)
    for part in (f"SFL {side}", str(VERSION), *agreed):
        data = part.encode() if isinstance(part, str) else part
        code.update(len(data).to_bytes(8, "big") + data)
    return code.hexdigest()


def _is_proof(given: str, wanted: str) -> bool:
    # Check the digits first: other text may not encode to bytes.
    return bool(_HEX.fullmatch(given)) and hmac.compare_digest(given.encode(), wanted.encode())


def client_authenticate(
    link: Link, tokens: Tokens, peer: Peer, *, listener: str, run: str = ""
) -> Conversation[str]:
    """Authenticate to a server, and verify that it has the token; return the server's run.

    The other end is ``server_authenticate``. ``listener``: the expected kind of server; ``run``:
    its expected run, if known.

    Raises:
        ConfigError: the file has no token for this client.
        AuthError: the server lacks the token, or has another run.
        ProtocolError: its reply is malformed.
    """
    token = tokens.of(peer)
    if token is None:
        raise ConfigError(
            f"--token-file {tokens.path}: has no token for"
            f" {f'--client-id {peer.client}' if peer.role == CLIENT else peer}"
            f"{'; say with --client-id whose is to be used' if peer == Peer(CLIENT) else ''}"
        )
    nonce = secrets.token_hex(32)
    hello = {"role": peer.role, "client_id": peer.client, "nonce": nonce}
    link.send_message_as_json(MessageType.AUTHENTICATE, content=hello)
    yield link
    reply = link.receive_message_as_json(MessageType.CHALLENGE)
    theirs = reply.get("run", str)
    if theirs and not RUN_NAME.fullmatch(theirs):
        raise ProtocolError(f"{link.peer_title} has an invalid name for its run")
    agreed = _proof_fields(peer, listener, theirs, nonce, reply.get("nonce", str), link.certificate)
    if not _is_proof(reply.get("proof", str), _proof(token, "listener", agreed)):
        raise AuthError(
            f"{link.peer_title} does not have the token of --token-file {tokens.path}: the tokens"
            " differ, or it is not the server that it should be"
        )
    unknown = [""] if listener != FED else []  # at who follows and has just been started again
    if run and theirs not in [run, *unknown]:
        raise AuthError(f"{link.peer_title} has the run {quoted(theirs, 80)} instead of {run}")
    proof = _proof(token, "caller", agreed)
    link.send_message_as_json(MessageType.PROOF, content={"proof": proof})
    return theirs


def server_authenticate(
    link: Link, tokens: Tokens, *, listener: str, run: str
) -> Conversation[Peer]:
    """Verify a peer's token, and prove to it that this server has it; return the peer.

    The other end is ``client_authenticate``.

    Raises:
        AuthError: the peer lacks the token.
        ProtocolError: its messages are malformed.
    """
    yield link
    hello = link.receive_message_as_json(
        MessageType.AUTHENTICATE, MessageType.REGISTER, MessageType.CHECK,
        MessageType.REQUEST_INFERENCE,
    )  # fmt: skip
    if hello.type is not MessageType.AUTHENTICATE:
        raise AuthError("this server asks for a token: give --token-file")
    peer = Peer(hello.get("role", str), hello.get("client_id", int))
    if not _ROLE.fullmatch(peer.role) or not ANY_ID <= peer.client < 2**31:
        raise ProtocolError("a peer has no valid role or client id")
    if not _HEX.fullmatch(theirs := hello.get("nonce", str)):
        raise ProtocolError("a peer has no nonce")
    # A peer without a token gets the same answer as one with a wrong token.
    token = tokens.of(peer) or secrets.token_bytes(TOKEN_BYTES)
    nonce = secrets.token_hex(32)
    agreed = _proof_fields(peer, listener, run, theirs, nonce, link.certificate)
    content = {"run": run, "nonce": nonce, "proof": _proof(token, "listener", agreed)}
    link.send_message_as_json(MessageType.CHALLENGE, content=content)
    yield link
    proof = link.receive_message_as_json(MessageType.PROOF).get("proof", str)
    if not _is_proof(proof, _proof(token, "caller", agreed)):
        raise AuthError("the token is not the one of this server; see --token-file")
    return peer


def _proof_fields(
    peer: Peer, listener: str, run: str, caller: str, nonce: str, certificate: bytes
) -> tuple[str | bytes, ...]:
    """Return the fields that a proof covers; the nonces are the caller's and the listener's."""
    return listener, peer.role, str(peer.client), run, caller, nonce, certificate
