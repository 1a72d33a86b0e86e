"""What whoever reaches a server's port may do: each attack is tried over real sockets.

An attack tries once and returns what the server did: ``quick_attacks`` at once, ``SLOW_ATTACKS``
after some seconds.
"""

import contextlib
import json
import os
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.hostile.files import RunsCode, saved
from experiments.hostile.target import (
    ANSWER_S,
    HELLO,
    Target,
    careless_tls,
    converse,
    frame,
    heard,
    link_over,
    raw,
    secured,
)
from experiments.hostile.upgrades import SLOW_UPGRADES, upgrade_attacks
from sfl.environment import FINGERPRINT
from sfl.transport.connection import Connection
from sfl.transport.stream import Stream
from sfl.transport.tokens import SERVER, client_authenticate
from sfl.wire.driver import run_blocking
from sfl.wire.framing import HEAD, MAGIC, encode_head, pack_head
from sfl.wire.link import CLIENT, Peer
from sfl.wire.messages import Message, MessageType

FIELDS: dict[str, Any] = {
    "type": "REGISTER", "sender": "", "receiver": "", "run": "", "round": -1, "step": -1,
    "client": -1, "link": 0, "content": "",
}  # fmt: skip


def with_fields(**changed: object) -> bytes:
    return raw(json.dumps(FIELDS | changed, separators=(",", ":")).encode())


def _replaced(old: bytes, new: bytes) -> bytes:
    text = with_fields()[HEAD.size :]
    return raw(text.replace(old, new))


def _flipped(byte: int) -> bytes:
    """Return a good frame of which one bit was flipped on the way."""
    data = bytearray(frame(HELLO, MessageType.AUTHENTICATE))
    data[byte] ^= 1
    return bytes(data)


def _of_protocol_1() -> bytes:
    """Return what SFL 0.1 says first."""
    return encode_head(Message(MessageType.AUTHENTICATE, content=HELLO), version=1)


def _file(kind: MessageType, data: bytes) -> bytes:
    return encode_head(Message(kind, payload=data)) + data


def _frames() -> dict[str, tuple[bytes, ...]]:
    """Return what strangers send, by what is wrong with it."""
    evil = saved(RunsCode())
    hello = frame(HELLO, MessageType.AUTHENTICATE)
    join = {"client_id": 0, "instance": "0" * 32, "heartbeat_s": 1.0, "fingerprint": {}}
    return {
        "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",),
        "random bytes": (os.urandom(2000),),
        "SFL 0.1": (_of_protocol_1(),),
        "another version": (pack_head(2, 0, version=99) + b"{}",),
        "unknown flags": (pack_head(2, 0, flags=255) + b"{}",),
        "a flipped bit in the magic": (_flipped(0),),
        "a flipped bit in the version": (_flipped(4),),
        "a flipped bit in a length": (_flipped(8),),
        "a flipped bit in the JSON": (_flipped(40),),
        "JSON of 2 GiB": (pack_head(2**31, 0),),
        "a length of 2^63": (pack_head(2, 2**63),),
        "a payload of 4 GiB": (pack_head(2, 2**32) + b"{}",),
        "JSON 10,000 deep": (raw(b"[" * 10_000),),
        "JSON 2,000 deep": (raw(b"[" * 2000),),
        "an integer of 10,000 digits": (raw(b'{"a":' + b"1" * 10_000 + b"}"),),
        "an integer of 3,000 digits": (raw(b'{"a":' + b"1" * 3000 + b"}"),),
        "1e999": (_replaced(b'"round":-1', b'"round":1e999'),),
        "NaN as a round": (_replaced(b'"round":-1', b'"round":NaN'),),
        "a field twice": (_replaced(b'"step"', b'"round"'),),
        "invalid UTF-8": (_replaced(b'"sender":""', b'"sender":"\xff\xfe"'),),
        "a NUL byte": (with_fields(run="a\0b"),),
        "../ in a name": (with_fields(run="../../../etc/passwd"),),
        "an absolute name": (with_fields(sender="/etc/passwd"),),
        "a line break in a name": (with_fields(sender="x\n2026-01-01 client_0 is ready"),),
        "a message out of turn": (frame(kind=MessageType.TRAINING_DONE),),
        "a heartbeat first": (frame(kind=MessageType.HEARTBEAT),),
        "evil labels": (_file(MessageType.TRAINING_LABELS, evil),),
        "evil activations": (_file(MessageType.TRAINING_FEATURES, evil),),
        "an evil model": (_file(MessageType.SEND_MODEL, evil),),
        "a REGISTER that lacks all": (frame({}),),
        "no token": (frame(join),),
        "a wrong token": (hello, frame({"proof": "0" * 64}, MessageType.PROOF)),
        "a proof of no text": (hello, frame({"proof": [1]}, MessageType.PROOF)),
        "a proof of half a character": (hello, frame({"proof": "\ud800"}, MessageType.PROOF)),
        "quotes and brackets": (raw(b"[" * 20 + b'"' + b'\\"' * 1900),),
        "the main server's role": (
            frame({**HELLO, "role": "main"}, MessageType.AUTHENTICATE),
            frame({"proof": "0" * 64}, MessageType.PROOF),
        ),
    }


def _sending(sent: tuple[bytes, ...]) -> Callable[[Target], str]:
    return lambda target: target.ask(*sent)


def replayed_handshake(target: Target) -> str:
    """Prove to have the token once, and send the same bytes again over a new connection."""
    if target.tokens is None:
        return "not tried: no token to record a handshake with"
    sent: list[bytes] = []

    class Recording(Connection):
        def _transmit(self, parts: list[memoryview], *, wait: bool = True) -> None:
            sent.append(b"".join(parts))
            super()._transmit(parts, wait=wait)

    with target.reach() as stream:
        link = link_over(stream, Recording)
        own = Peer(CLIENT, target.tokens.only_client or 0)
        run_blocking(client_authenticate(link, target.tokens, own, listener=SERVER))
    return target.ask(*sent)


def another_clients_id(target: Target) -> str:
    """Prove to be the client that the token is of, and register as another one."""
    with target.reach() as stream:
        link = link_over(stream)
        other = 0
        if target.tokens is not None:
            own = target.tokens.only_client or 0
            other = 1 if own == 0 else 0
            peer = Peer(CLIENT, own)
            run_blocking(client_authenticate(link, target.tokens, peer, listener=SERVER))
        fingerprint = dict.fromkeys(FINGERPRINT, "x")
        content = {"client_id": other, "instance": secrets.token_hex(16), "heartbeat_s": 1.0}
        link.send_message_as_json(
            MessageType.REGISTER, content=content | {"fingerprint": fingerprint}
        )
        return heard(link)


def plain_text_to_tls(target: Target) -> str:
    with target.plain() as sock:
        return converse(Stream(sock), frame())


def tls_to_plain_text(target: Target) -> str:
    if target.tls:
        return "not tried: the server speaks TLS"
    return _shake(target, careless_tls())


def old_tls(target: Target) -> str:
    return _shake(target, careless_tls(ssl.TLSVersion.TLSv1))


def _shake(target: Target, context: ssl.SSLContext) -> str:
    with target.plain() as sock:
        try:
            secured(sock, context)
        except (ssl.SSLError, OSError) as error:
            return f"no TLS: {getattr(error, 'reason', None) or type(error).__name__}"
    return "TLS"


def shows(target: Target, own: list[str]) -> str:
    """Show a certificate (the options that name it and its key), or none."""
    context = careless_tls()
    if own:
        context.load_cert_chain(own[1], own[3])
    with target.plain() as sock:
        try:
            return converse(secured(sock, context), frame())
        except ssl.SSLError as error:
            return f"no TLS: {error.reason}"


def slowloris(target: Target) -> str:
    """Send a byte every five seconds."""
    with target.plain() as sock:
        sock.settimeout(5)
        for byte in (b"\x16\x03\x01" if target.tls else MAGIC) + bytes(20):
            try:
                sock.send(bytes([byte]))
                if not sock.recv(4096):
                    return "closed the connection"
            except TimeoutError:
                continue
            except OSError:
                return "closed the connection"
    return "took it all"


def idle_crowd(target: Target, number: int = 1000) -> str:
    """Open a thousand connections and say nothing; return how long the last ones last."""
    with contextlib.ExitStack() as stack:
        crowd, refused = [], 0
        for _ in range(number):
            try:
                crowd.append(stack.enter_context(target.plain(timeout_s=2)))
            except OSError:
                refused += 1
        deadline = time.monotonic() + ANSWER_S
        left = [sock for sock in crowd if not _is_closed(sock)]
        at_once = len(left)
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = [sock for sock in left if not _is_closed(sock)]
    return f"left {at_once // 50 * 50} or so waiting, and closed {'all' if not left else 'some'}"


def _is_closed(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        while sock.recv(4096):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def full_speed(target: Target, seconds: float = 5.0) -> str:
    """Connect and close for some seconds, as fast as this machine can."""
    began, count, failed = time.monotonic(), 0, 0
    while time.monotonic() - began < seconds:
        try:
            with target.plain(timeout_s=1):
                count += 1
        except OSError:
            failed += 1
    return f"took {round(count / seconds, -2):.0f} connections a second"


def half_open(target: Target) -> str:
    """Leave a connection without a word: with a reset, in the middle of a message."""
    with target.plain() as sock:
        sock.send(frame()[:30])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return target.ask(frame(HELLO, MessageType.AUTHENTICATE), frame())


def quick_attacks() -> dict[str, Callable[[Target], str]]:
    """Return what strangers do that is answered at once."""
    return {
        **{name: _sending(sent) for name, sent in _frames().items()},
        "a replayed handshake": replayed_handshake,
        "another client's id": another_clients_id,
        "plain text to a TLS port": plain_text_to_tls,
        "TLS 1.0": old_tls,
        "half-open connections": half_open,
        **upgrade_attacks(),
    }


SLOW_ATTACKS: Mapping[str, Callable[[Target], str]] = {
    "half a frame, and silence": lambda target: target.ask(frame()[:-5]),
    "a byte every 5 seconds": slowloris,
    "1,000 idle connections": idle_crowd,
    "connect and close for 5 s": full_speed,
    **SLOW_UPGRADES,
}
