"""Agree on the samples that all clients have, by their ids: both ends.

Needed where clients have different columns of the same samples, each in a file of its own::

    client                                           server
    REQUEST_TO_START                             ->
                                                 <-  REQUEST_IDS
    SAMPLE_IDS    + digests of its ids           ->  when all are there: the ids that all have
                                                 <-  SAMPLE_ORDER {counts}
                                                 <-  SAMPLE_IDS   + digests of these ids
                                                 <-  GO_ON, at its first round
    REQUEST_TO_START {counts}                    ->  the server of a further task

Hops pass all this on; the ids are sealed, and how many samples all have is not.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfl.data.client_data import ClientData, held_out
from sfl.data.vertical import Ids
from sfl.errors import ProtocolError
from sfl.files.torch_file import TensorSpec, decode, encode, max_file_bytes
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType
from sfl.wire.passing import pass_on
from sfl.wire.seal import OVERHEAD_BYTES


def _spec(count: int) -> TensorSpec:
    return TensorSpec((count, 2), torch.int64)


def accept(link: Link, most_ids: int | None) -> None:
    """Let a link take a file of so many ids; None: no more."""
    taken = dict(link.limits.payload_bytes)
    taken.pop(MessageType.SAMPLE_IDS, None)
    if most_ids is not None:
        taken[MessageType.SAMPLE_IDS] = max_file_bytes([_spec(most_ids)]) + OVERHEAD_BYTES
    link.limits = dataclasses.replace(link.limits, payload_bytes=taken)


def client_send_ids(link: Link, ids: Ids) -> Conversation[None]:
    """Send the ids of the client's samples; faces ``server_receive_ids``."""
    accept(link, sum(map(len, ids.values())))  # the run's may be read ahead
    yield link
    link.receive_message_as_json(MessageType.REQUEST_IDS)
    link.send_file(MessageType.SAMPLE_IDS, encode(torch.cat([*ids.values()])))


def server_receive_ids(link: Link, num_samples: Mapping[str, int]) -> Conversation[Ids]:
    """Ask a client for the ids of its samples, by part.

    Raises:
        ProtocolError: an id occurs twice.
    """
    total = sum(num_samples.values())
    accept(link, total)
    link.send_message_as_json(MessageType.REQUEST_IDS)
    yield link
    message = link.receive_file(MessageType.SAMPLE_IDS)
    accept(link, None)
    ids = decode(message.payload, _spec(total), f"the ids of {link.peer_title}", message.checksum)
    parts = dict(zip(num_samples, ids.split_with_sizes([*num_samples.values()]), strict=True))
    if any(len(torch.unique(part, dim=0)) < len(part) for part in parts.values()):
        raise ProtocolError(f"{link.peer_title} names a sample twice")
    return parts


def num_of(ids: Ids) -> dict[str, int]:
    """Return the number of samples of each part."""
    return {part: len(of_part) for part, of_part in ids.items()}


def server_send_order(link: Link, order: Ids) -> None:
    """Send a client the ids of the run's samples, in their order."""
    link.send_message_as_json(MessageType.SAMPLE_ORDER, content=num_of(order))
    link.send_file(MessageType.SAMPLE_IDS, encode(torch.cat([*order.values()])))


def client_receive_order(link: Link, own: Ids) -> Conversation[dict[str, Tensor]]:
    """Receive the ids of the run's samples; faces ``server_send_order``.

    Raises:
        ProtocolError: there are more than the client has.
    """
    yield link
    message = link.receive_message_as_json(MessageType.SAMPLE_ORDER)
    counts = _counts(message, num_of(own))
    yield link
    message = link.receive_file(MessageType.SAMPLE_IDS)
    spec = _spec(sum(counts.values()))
    ids = decode(message.payload, spec, "the run's samples", message.checksum)
    return dict(zip(own, ids.split_with_sizes([*counts.values()]), strict=True))


def client_align(
    link: Link, data: Sequence[ClientData], drawn_as: int
) -> Conversation[Sequence[ClientData]]:
    """Return a client's data at each server with the run's samples alone, in their order.

    Data that are not to be aligned stay as they are. ``drawn_as``: see ``ClientData.aligned``.
    """
    if not (identified := data[0].identified):
        return data
    order = yield from client_receive_order(link, identified.ids)
    return [one.aligned(order, drawn_as) for one in data]


def hop_pass_ids(
    link: Link, onward: Link, num_samples: Mapping[str, int]
) -> Conversation[dict[str, int]]:
    """Pass on a client's ids and the run's; return how many samples of each part the run has.

    ``num_samples``: those that the client has.
    """
    yield onward
    onward.receive_message_as_json(MessageType.REQUEST_IDS)
    for side in (link, onward):
        accept(side, sum(num_samples.values()))
    link.send_message_as_json(MessageType.REQUEST_IDS)
    yield from pass_on(link, onward, MessageType.SAMPLE_IDS)
    accept(link, None)
    message = yield from hop_pass_order(link, onward)
    accept(onward, None)
    return aligned_counts(_counts(message, num_samples))


def hop_pass_order(link: Link, onward: Link) -> Conversation[Message]:
    """Pass on the ids of the run's samples; return the message that says how many there are."""
    message = yield from pass_on(onward, link, MessageType.SAMPLE_ORDER)
    yield from pass_on(onward, link, MessageType.SAMPLE_IDS)
    return message


def _counts(message: Message, most: Mapping[str, int]) -> dict[str, int]:
    """Return how many samples of each part the run has.

    Raises:
        ProtocolError: they are more than the client has.
    """
    counts = {part: message.get(part, int) for part in most}
    if any(not 0 <= n <= most[part] for part, n in counts.items()):
        raise ProtocolError(f"the server names {[*counts.values()]} samples, more than are here")
    return counts


def aligned_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of samples of each part, see ``ClientData.aligned``."""
    num_held_out = 0 if counts["validation"] else held_out(counts["train"])
    return {
        **counts,
        "train": counts["train"] - num_held_out,
        "validation": counts["validation"] + num_held_out,
    }
