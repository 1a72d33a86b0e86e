"""What a peer of bad will may do to a server's port: each attack is tried over real sockets.

``quick_attacks`` and ``SLOW_ATTACKS`` are of whoever reaches the port, ``insiders`` of somebody who
is a client of the run. Each tries once and returns what the server did.
"""

import contextlib
import dataclasses
import os
import secrets
import socket
import ssl
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.hostile.files import hostile_files, saved
from sfl.conversation.join import DataReport, Welcome, client_join, send_report
from sfl.conversation.round import SECONDS_WIDTH
from sfl.errors import ConnectionLost, LetGo, SflError
from sfl.files.checksum import checksum, crc32
from sfl.files.torch_file import encode
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.transport.connection import Connection
from sfl.transport.stream import Stream, TlsStream
from sfl.transport.tokens import SERVER, Tokens, client_authenticate
from sfl.values import Position
from sfl.weights.exchange import client_weights
from sfl.wire.driver import run_blocking
from sfl.wire.framing import HEAD, MAGIC, encode_head, pack_head
from sfl.wire.link import CLIENT, Peer, is_last
from sfl.wire.messages import Limits, Message, MessageType

ANSWER_S = 15.0  # longer than a server waits for who does not come to the point
SHAPE, NUM_CLASSES, BATCH = (1, 28, 28), 10, 4
FIELDS: dict[str, Any] = {
    "type": "REGISTER", "sender": "", "receiver": "", "run": "", "round": -1, "step": -1,
    "client": -1, "link": 0, "content": "",
}  # fmt: skip


@dataclass
class Target:
    """A server of this machine."""

    host: str
    port: int
    tls: bool = False
    tokens: Tokens | None = None  # of the attacker: it is one client, and no other

    @contextlib.contextmanager
    def plain(self, timeout_s: float = ANSWER_S) -> Iterator[socket.socket]:
        """Connect, in the clear whatever the server speaks."""
        with socket.create_connection((self.host, self.port), timeout=timeout_s) as sock:
            yield sock

    @contextlib.contextmanager
    def reach(self) -> Iterator[Stream]:
        """Connect as the server wants it; the attacker trusts any certificate."""
        with self.plain() as sock:
            yield secured(sock, careless_tls()) if self.tls else Stream(sock)

    def ask(self, *sent: bytes) -> str:
        """Send bytes and return what the server says and does."""
        with self.reach() as stream:
            return _converse(stream, *sent)


def secured(sock: socket.socket, context: ssl.SSLContext) -> TlsStream:
    """Begin TLS with a server, whoever it is."""
    stream = TlsStream(sock, context, host="127.0.0.1")
    stream.set_timeout(ANSWER_S)
    stream.finish_handshake()
    return stream


def careless_tls(newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """Return TLS that trusts everybody, up to a version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for versions that nobody should speak
        context.minimum_version = min(newest, ssl.TLSVersion.TLSv1_2)
        context.maximum_version = newest
        if newest < ssl.TLSVersion.TLSv1_2:
            context.set_ciphers("ALL:@SECLEVEL=0")  # else our own side would not even try
    return context


def _converse(stream: Stream, *sent: bytes) -> str:
    link = _link(stream)
    with contextlib.suppress(SflError):  # it may close before it has all
        for data in sent:
            link._transmit([memoryview(data)])
    return heard(link)


def _link(stream: Stream, kind: type[Connection] = Connection) -> Connection:
    """Return messages over a connection."""
    link = kind(stream, timeout_s=ANSWER_S, limits=Limits())
    link.certificate = stream.certificate
    return link


def heard(link: Connection) -> str:
    """Return what a server says, to its last word or until it closes."""
    link.peer_name, said = "server", ""
    try:
        while True:
            message = link._next()
            said = f"{message.type}"
            if is_last(message):
                return f"{message.type}: {message.content}"
    except (OSError, SflError) as error:
        how = str(error).removeprefix("the server ")
        return f"{said}, then {how}" if said else how


def frame(content: object = "", kind: MessageType = MessageType.REGISTER, **more: Any) -> bytes:
    return encode_head(Message(kind, content=content, **more))


def raw(text: bytes, payload: bytes = b"") -> bytes:
    """Return a frame with any JSON."""
    return pack_head(len(text), len(payload), crc=crc32(text)) + text + payload


def with_fields(**changed: object) -> bytes:
    import json

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


HELLO = {"role": "client", "client_id": 0, "nonce": "0" * 64}
EVIL = "a pickle that runs code"


def _frames() -> dict[str, tuple[bytes, ...]]:
    """Return what strangers send, by what is wrong with it."""
    evil = hostile_files()[EVIL][0]
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
        link = _link(stream, Recording)
        own = Peer(CLIENT, target.tokens.only_client or 0)
        run_blocking(client_authenticate(link, target.tokens, own, listener=SERVER))
    return target.ask(*sent)


def another_clients_id(target: Target) -> str:
    """Prove to be the client that the token is of, and register as another one."""
    with target.reach() as stream:
        link = _link(stream)
        other = 0
        if target.tokens is not None:
            own = target.tokens.only_client or 0
            other = 1 if own == 0 else 0
            peer = Peer(CLIENT, own)
            run_blocking(client_authenticate(link, target.tokens, peer, listener=SERVER))
        fingerprint = dict.fromkeys(("torch", "capability", "threads", "device"), "x")
        content = {"client_id": other, "instance": secrets.token_hex(16), "heartbeat_s": 1.0}
        link.send_message_as_json(
            MessageType.REGISTER, content=content | {"fingerprint": fingerprint}
        )
        return heard(link)


def plain_text_to_tls(target: Target) -> str:
    with target.plain() as sock:
        return _converse(Stream(sock), frame())


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
            return _converse(secured(sock, context), frame())
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
    }


SLOW_ATTACKS: Mapping[str, Callable[[Target], str]] = {
    "half a frame, and silence": lambda target: target.ask(frame()[:-5]),
    "a byte every 5 seconds": slowloris,
    "1,000 idle connections": idle_crowd,
    "connect and close for 5 s": full_speed,
}


# Insiders


def write_bystander(folder: Path) -> Path:
    """Write the data of an honest client of the same run: a server of a client that would fail
    again, and of no other, ends.
    """
    import numpy as np

    folder.mkdir()
    labels = np.arange(5 * NUM_CLASSES) % NUM_CLASSES
    classes = np.array([str(k) for k in range(NUM_CLASSES)])
    np.savez(
        folder / "own.npz", x=np.zeros((len(labels), *SHAPE[1:]), "u1"), y=labels, classes=classes
    )
    return folder


@dataclass(frozen=True)
class Claim:
    """What a client says that it has."""

    train: int = 2 * BATCH
    validation: int = BATCH
    test: int = BATCH
    num_classes: int = NUM_CLASSES
    shape: tuple[int, ...] = SHAPE
    class_counts: tuple[int, ...] = ()

    @property
    def report(self) -> DataReport:
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        classes = tuple(map(str, range(self.num_classes)))
        return DataReport(counts, classes, self.shape, "0" * 64, self.class_counts)


class Insider:
    """Somebody who is a client of a run with ``partition own``, and means harm."""

    def __init__(self, stream: Stream, client: int = 0, claim: Claim | None = None) -> None:
        self.link, self.client = _link(stream), client
        self.link.peer_name, self.link.on_notice = "server", lambda line: None
        self.welcome = self._join(claim or Claim())
        self.run = self.welcome.run.run

    def _join(self, claim: Claim) -> Welcome:
        fingerprint = dict.fromkeys(("torch", "capability", "threads", "device"), "x")
        instance = secrets.token_hex(16)
        joining = client_join(
            self.link, self.client, fingerprint, instance=instance, heartbeat_s=10.0
        )
        welcome = run_blocking(joining)
        built = SplitModel(Recipe.of(welcome.run), SHAPE, claim.num_classes).structure
        send_report(self.link, dataclasses.replace(claim.report, structure=built, weights="0" * 8))
        return welcome

    def at(self, step: int = -1, round_index: int = 0) -> Position:
        return Position(self.run, round_index, step, self.client)

    def begin(self) -> None:
        """Do all that comes before the first step."""
        link = self.link
        link.receive_message_as_json(MessageType.GO_ON)
        self.decline_weights()
        link.receive_message_as_json(MessageType.START_TRAINING)

    def decline_weights(self) -> None:
        """Say of the weights that are offered that we have them."""
        offer = self.link.receive_message_as_json(MessageType.REQUEST_TO_SEND_FILE)
        has_it = {"offset": offer.get("bytes", int)}
        self.link.send_message_as_json(MessageType.SEND_FILE, content=has_it, at=offer.at)

    def train(self) -> None:
        """Take part in the round's steps as one should."""
        import torch

        link = self.link
        link.limits = Limits(payload_bytes={MessageType.TRAINING_GRADS: 2**20})
        for step in range(2):
            self.send(
                MessageType.TRAINING_LABELS, encode(torch.zeros(BATCH, dtype=torch.int64)), step
            )
            self.send(MessageType.TRAINING_FEATURES, encode(torch.zeros(BATCH, 128)), step)
            link.receive_file(MessageType.TRAINING_GRADS)
        spent = dict.fromkeys(("compute_s", "wait_s", "transfer_s"), f"{0:0{SECONDS_WIDTH}.6f}")
        link.send_message_as_json(MessageType.ROUND_TRAINED, content=spent, at=self.at())

    def send(self, kind: MessageType, data: bytes, step: int = 0) -> None:
        self.link.send_file(kind, data, at=self.at(step))

    def announce(self, kind: MessageType, num_bytes: int) -> None:
        """Say that a file of so many bytes follows."""
        text = encode_head(Message(kind, at=self.at(0), payload=b"x"))[HEAD.size :]
        head = pack_head(len(text), num_bytes, crc=crc32(text))
        self.link._stream.send([memoryview(head + text)])

    def upload(self, data: bytes, num_bytes: int | None = None) -> None:
        """Offer weights of so many bytes, and send them."""
        size = len(data) if num_bytes is None else num_bytes
        offer = {"name": client_weights(0), "bytes": size, "checksum": checksum(data)}
        at = self.at()
        self.link.send_message_as_json(MessageType.REQUEST_TO_SEND_FILE, content=offer, at=at)
        self.link.receive_message_as_json(MessageType.SEND_FILE)
        self.link.send_file(MessageType.SEND_MODEL, data, at=at)


LABELS, FEATURES = MessageType.TRAINING_LABELS, MessageType.TRAINING_FEATURES
Harm = Callable[[Insider], None]


def _tensors() -> dict[str, Any]:
    import torch

    z = torch.zeros(BATCH, 128)
    bad = z.clone()
    bad[1, 2] = float("nan")
    huge = z.clone()
    huge[0, 0] = 3e38
    infinite = z.clone()
    infinite[3, 4] = -float("inf")
    return {
        "NaN": bad, "infinity": infinite, "3e38": huge, "a dtype too wide": z.double(),
        "a sample too many": torch.zeros(BATCH + 1, 128), "a transposed shape": z.t().contiguous(),
    }  # fmt: skip


def _labels() -> dict[str, Any]:
    import torch

    return {
        "labels out of range": torch.tensor([0, 1, 2, NUM_CLASSES]),
        "labels below 0": torch.tensor([0, 1, 2, -1]),
        "labels that are no integers": torch.zeros(BATCH),
        "labels of another shape": torch.zeros(BATCH, 1, dtype=torch.int64),
    }


def _as_labels(data: bytes) -> Harm:
    import torch

    activations = encode(torch.zeros(BATCH, 128))

    def harm(insider: Insider) -> None:
        insider.send(LABELS, data)
        insider.send(FEATURES, activations)

    return harm


def _as_activations(data: bytes) -> Harm:
    import torch

    labels = encode(torch.zeros(BATCH, dtype=torch.int64))

    def harm(insider: Insider) -> None:
        insider.send(LABELS, labels)
        insider.send(FEATURES, data)

    return harm


def _as_model(data: bytes, num_bytes: int | None = None) -> Harm:
    def harm(insider: Insider) -> None:
        insider.train()
        insider.upload(data, num_bytes)

    return harm


def _says(kind: MessageType) -> Harm:
    return lambda insider: insider.link.send_message_as_json(kind, at=insider.at())


def _model_of(value: float) -> Harm:
    """Send the right weights, but for some of this value."""
    import torch

    from sfl.files.torch_file import encode_state

    def harm(insider: Insider) -> None:
        front = SplitModel(Recipe.of(insider.welcome.run), SHAPE, NUM_CLASSES).front_state()
        name = next(iter(front))
        front[name] = torch.full_like(front[name], value)
        _as_model(encode_state(front))(insider)

    return harm


def _damaged(insider: Insider) -> None:
    wrong = "crc32:00000000"
    message = Message(LABELS, at=insider.at(0), payload=b"x" * 100, checksum=wrong)
    insider.link._stream.send([memoryview(encode_head(message) + b"y" * 100)])


def insiders() -> dict[str, Harm]:
    """Return what a client of a run may send at its first step, by what is wrong with it."""
    found: dict[str, Harm] = {}
    for name, (data, _) in hostile_files().items():
        if data:  # a file of nothing is no frame
            found[f"activations: {name}"] = _as_activations(data)
            found[f"labels: {name}"] = _as_labels(data)
    found |= {f"activations: {name}": _as_activations(saved(t)) for name, t in _tensors().items()}
    found |= {name: _as_labels(saved(t)) for name, t in _labels().items()}
    found |= {
        "a file of 4 GiB announced": lambda insider: insider.announce(FEATURES, 2**32),
        "a file of 1 GB announced": lambda insider: insider.announce(LABELS, 10**9),
        "a file damaged on the way": _damaged,
        "activations before labels": lambda insider: insider.send(FEATURES, b"x"),
        "a step that is not its turn": lambda insider: insider.send(LABELS, b"x", step=7),
        "a round that is not its turn": _says(MessageType.ROUND_TRAINED),
        "a model that was not offered": lambda insider: insider.send(MessageType.SEND_MODEL, b"x"),
        "REGISTER again": _says(MessageType.REGISTER),
        "a server's message": _says(MessageType.TRAINING_DONE),
    }
    # The last, since the steps that come before them count.
    for name in (
        EVIL, "a deflate bomb", "nested tuples as a key", "a view", "a dict", "a pickle in front",
    ):  # fmt: skip
        found[f"model: {name}"] = _as_model(hostile_files()[name][0])
    found |= {"model: NaN": _model_of(float("nan")), "model: 3e38": _model_of(3e38)}
    return found | {
        "a model larger than the model": _as_model(bytes(4_000_000)),
        "a model of 2^62 bytes offered": _as_model(b"x", 2**62),
    }


TIMES = 200  # that a client takes its own place over


def takes_its_own_place(target: Target) -> str:
    """Register again and again as the same process, with a new connection each time."""
    fingerprint = dict.fromkeys(("torch", "capability", "threads", "device"), "x")
    instance, given = secrets.token_hex(16), 0
    client = (target.tokens.only_client or 0) if target.tokens else 0
    with contextlib.ExitStack() as stack:
        for _ in range(TIMES):
            link = _link(stack.enter_context(target.reach()))
            joining = client_join(link, client, fingerprint, instance=instance, heartbeat_s=10.0)
            with contextlib.suppress(LetGo, ConnectionLost):
                if target.tokens:
                    peer = Peer(CLIENT, client)
                    run_blocking(client_authenticate(link, target.tokens, peer, listener=SERVER))
                run_blocking(joining)
                given += 1
    return f"the place was given {given} times of {TIMES}"


def try_insider(target: Target, harm: Harm) -> str:
    """Join a run as its client, do one thing, and return what the server says."""
    with target.reach() as stream:
        insider = Insider(stream)
        insider.begin()
        with contextlib.suppress(SflError):  # what it hears then is told below
            harm(insider)
        return heard(insider.link)
