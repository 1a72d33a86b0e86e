"""Connect to a listening test server."""

from collections.abc import Callable

from sfl.transport.connecting import Dialling, open_stream
from sfl.transport.connection import Connection
from sfl.transport.shaping import UNSHAPED
from sfl.values import LinkShape
from sfl.wire.messages import Limits


def dial(
    address: str,
    *,
    limits: Limits | None = None,
    timeout_s: float = 5,
    patience_s: float = 5,
    on_wait: Callable[[str], None] = print,
    shape: LinkShape = UNSHAPED,
) -> Connection:
    """Return a connection that whoever waits for a message reads."""
    dialling = Dialling(timeout_s, None, shape, on_wait)
    stream = open_stream(address, dialling, patience_s, is_reconnect=False)
    return Connection(stream, timeout_s=timeout_s, limits=limits or Limits())
