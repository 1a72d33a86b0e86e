"""Agree on the samples that all clients have, by their ids: both ends.

Needed where clients have different columns of the same samples, each in a file of its own::

    client                                           server
    REQUEST_TO_START                             ->
                                                 <-  REQUEST_IDS
    SAMPLE_IDS    + digests of its ids           ->  when all are there: the ids that all have
    at its first round, over each connection:
                                                 <-  SAMPLE_ORDER + these ids {counts}
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from sfl.data.client_data import held_out
from sfl.data.vertical import Ids
from sfl.errors import ProtocolError
from sfl.files.torch_file import TensorSpec, decode, encode, max_file_bytes
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import MessageType


def _spec(count: int) -> TensorSpec:
    return TensorSpec((count, 2), torch.int64)


def accept(link: Link, message_type: MessageType, most_ids: int) -> None:
    """Let a link take a file of so many ids."""
    taken = dict(link.limits.payload_bytes) | {message_type: max_file_bytes([_spec(most_ids)])}
    link.limits = dataclasses.replace(link.limits, payload_bytes=taken)


def client_send_ids(link: Link, ids: Ids) -> Conversation[None]:
    """Send the ids of the client's samples; faces ``server_receive_ids``."""
    accept(link, MessageType.SAMPLE_ORDER, sum(map(len, ids.values())))  # it may be read ahead
    yield link
    link.receive_message_as_json(MessageType.REQUEST_IDS)
    link.send_file(MessageType.SAMPLE_IDS, encode(torch.cat([*ids.values()])))


def server_receive_ids(link: Link, num_samples: Mapping[str, int]) -> Conversation[Ids]:
    """Ask a client for the ids of its samples, by part.

    Raises:
        ProtocolError: an id occurs twice.
    """
    total = sum(num_samples.values())
    accept(link, MessageType.SAMPLE_IDS, total)
    link.send_message_as_json(MessageType.REQUEST_IDS)
    yield link
    message = link.receive_file(MessageType.SAMPLE_IDS)
    ids = decode(message.payload, _spec(total), f"the ids of {link.peer_title}", message.checksum)
    parts = dict(zip(num_samples, ids.split_with_sizes([*num_samples.values()]), strict=True))
    if any(len(torch.unique(part, dim=0)) < len(part) for part in parts.values()):
        raise ProtocolError(f"{link.peer_title} names a sample twice")
    return parts


def server_send_order(link: Link, order: Ids) -> None:
    """Send a client the ids of the run's samples, in their order."""
    counts = {part: len(ids) for part, ids in order.items()}
    data = encode(torch.cat([*order.values()]))
    link.send_file(MessageType.SAMPLE_ORDER, data, content=counts)


def client_receive_order(link: Link, own: Ids) -> Conversation[dict[str, Tensor]]:
    """Receive the ids of the run's samples; faces ``server_send_order``.

    Raises:
        ProtocolError: there are more than the client has.
    """
    yield link
    message = link.receive_file(MessageType.SAMPLE_ORDER)
    counts = [message.get(part, int) for part in own]
    if any(not 0 <= n <= len(ids) for n, ids in zip(counts, own.values(), strict=True)):
        raise ProtocolError(f"the server names {counts} samples, more than are here")
    ids = decode(message.payload, _spec(sum(counts)), "the run's samples", message.checksum)
    return dict(zip(own, ids.split_with_sizes(counts), strict=True))


def aligned_counts(order: Ids) -> dict[str, int]:
    """Return the number of samples of each part, see ``ClientData.aligned``."""
    counts = {part: len(ids) for part, ids in order.items()}
    if not counts["validation"]:
        counts["validation"] = held_out(counts["train"])
        counts["train"] -= counts["validation"]
    return counts
