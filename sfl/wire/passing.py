"""Pass the messages of one peer on to another, unread."""

from sfl.values import Position
from sfl.wire.driver import Conversation
from sfl.wire.link import Link
from sfl.wire.messages import Message, MessageType


def pass_on(
    source: Link, target: Link, *expected: MessageType, at: Position | None = None
) -> Conversation[Message]:
    """Receive the next message of one peer and send it to another; return it.

    Raises:
        ProtocolError, PeerFailed, ConnectionLost: as ``receive_message_as_json``.
    """
    yield source
    message = source.receive_message_as_json(*expected, at=at)
    target.send_file(
        message.type, message.payload, content=message.content, at=message.at,
        checksum=message.checksum,
    )  # fmt: skip
    return message
