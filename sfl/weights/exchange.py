"""``WeightStore``: the interface for transferring client-side weights, and its socket version.

A store is one party's end: one end puts weights under a key, the other gets them.
``sfl.weights.stored_weights`` has the one through a place that all parties reach;
``sfl.weights.stores`` chooses. Over a connection::

    sender                                receiver
    put                                   get
    REQUEST_TO_SEND_FILE {size, checksum} ->
                                          <- SEND_FILE {offset}     offset = size: has it already
    SEND_MODEL or SEND_AGGREGATED_MODEL   ->                        the bytes from the offset on
"""

import re
from dataclasses import dataclass
from typing import Protocol

from sfl.errors import IntegrityError, ProtocolError, quoted
from sfl.files.checksum import checksum
from sfl.files.torch_reader import Buffer
from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import MessageType

INITIAL, AVERAGE = "init", "client_avg"  # names of weights; client_weights(k) names one client's


def client_weights(client: int) -> str:
    """Return the name of one client's weights."""
    return f"client_{client}"


def check_name(name: str) -> str:
    """Return a name of weights that came from a server, after a check.

    Raises:
        ProtocolError: it is not the name of weights that a round starts from.
    """
    if not re.fullmatch(rf"{INITIAL}|{AVERAGE}|client_\d{{1,9}}", name, re.ASCII):
        raise ProtocolError(f"{quoted(name, 40)} is no name of weights")
    return name


@dataclass(frozen=True)
class WeightKey:
    """The identity of weights: their name and their place in the run."""

    name: str
    at: Position

    @property
    def message_type(self) -> MessageType:
        averaged = self.name == AVERAGE
        return MessageType.SEND_AGGREGATED_MODEL if averaged else MessageType.SEND_MODEL


@dataclass(frozen=True)
class NamedWeights:
    """Weights to put into a store, and their name."""

    name: str
    data: bytes  # a state's file
    samples: int = 0  # number of samples that it was trained on


class WeightStore(Protocol):
    """One party's access to the weights of a run; ``data`` are the bytes of a state's file."""

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        """Make weights, trained on ``samples`` samples, available under a key."""
        ...

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        """Make weights available to the peer that another party has put already."""
        ...

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        """Return the weights of a key; ``held`` may be the same file, which saves the transfer."""
        ...


class SocketWeights:
    """Weights over the connection, held in memory at both ends."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        link = self._link
        data_checksum = checksum(data)
        offer = {"name": key.name, "bytes": len(data), "checksum": data_checksum}
        link.send_message_as_json(MessageType.REQUEST_TO_SEND_FILE, content=offer, at=key.at)
        yield link
        answer = link.receive_message_as_json(MessageType.SEND_FILE, at=key.at)
        offset = answer.get("offset", int)
        if not 0 <= offset <= len(data):
            raise ProtocolError(f"{link.peer_title} asks for byte {offset} of {len(data)}")
        if offset == 0:
            link.send_file(key.message_type, data, at=key.at, checksum=data_checksum)
        elif offset < len(data):
            link.send_file(key.message_type, memoryview(data)[offset:], at=key.at)

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        yield from self.put(key, data)

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        link = self._link
        yield link
        offer = link.receive_message_as_json(MessageType.REQUEST_TO_SEND_FILE, at=key.at)
        if (name := offer.get("name", str)) != key.name:
            raise ProtocolError(f"{link.peer_title} offers {quoted(name, 40)}, not {key.name}")
        size, announced = offer.get("bytes", int), offer.get("checksum", str)
        has_it = len(held) == size and checksum(held) == announced
        answer = {"offset": size if has_it else 0}
        link.send_message_as_json(MessageType.SEND_FILE, content=answer, at=key.at)
        if has_it:
            return held
        yield link
        file = link.receive_file(key.message_type, at=key.at).file
        if len(file.data) != size or (file.checksum or checksum(file.data)) != announced:
            raise IntegrityError(f"the weights {key.name} are not those that were offered")
        return file.data


class Elsewhere:
    """The main server's end if a separate fed server has the weights: it transfers none."""

    def put(self, key: WeightKey, data: bytes, samples: int = 0) -> Conversation[None]:
        yield from ()

    def pass_on(self, key: WeightKey, data: bytes) -> Conversation[None]:
        yield from ()

    def get(self, key: WeightKey, held: bytes = b"") -> Conversation[Buffer]:
        yield from ()
        return b""
