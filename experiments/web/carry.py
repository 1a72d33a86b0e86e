"""A WebSocket of a page, carried byte for byte to a server of SFL behind the site.

::

    page   binary messages, cut anywhere   ->  bytes   server
           <-  binary messages             <-  bytes

Neither side is read faster than the other takes it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from sfl.errors import AuthError, ConfigError, RunError, SflError, reason_of

MOST_IN_MESSAGE = 2**20  # bytes
PIECE = 2**16  # bytes that are read from the server at once
OPEN_WITHIN_S = 10.0
LAST_WORDS_S = 5.0  # for a server's last words, once it takes no more
_MOST_REASON = 120  # bytes of a close's reason, RFC 6455 section 5.5: 123

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Open = Callable[[], Awaitable[Ends]]  # connects to the server


class NotThere(RunError):
    """The server behind the site does not answer."""


async def carry(socket: ServerConnection, open_server: Open) -> str:
    """Carry until one side ends; return why, "" if a side has just left.

    Raises:
        NotThere: there is nobody to carry to.
    """
    try:
        async with asyncio.timeout(OPEN_WITHIN_S):
            reader, writer = await open_server()
    except (OSError, SflError) as error:  # includes TimeoutError
        why = _told(error)
        is_refused = isinstance(error, AuthError | ConfigError)  # for want of a token: as ever
        code = CloseCode.POLICY_VIOLATION if is_refused else CloseCode.TRY_AGAIN_LATER
        await socket.close(code, _short(why))
        if isinstance(error, OSError):
            raise NotThere(why) from error
        return why
    up = asyncio.create_task(_up(socket, writer))
    down = asyncio.create_task(_down(reader, socket))
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        if up.done() and not up.exception() and up.result():  # the page did wrong
            await socket.close(CloseCode.UNSUPPORTED_DATA, _short(up.result()))
            return up.result()
        if up.done() and up.exception():  # the server takes no more: what it says last tells why
            await asyncio.wait((down,), timeout=LAST_WORDS_S)
        await socket.close(CloseCode.NORMAL_CLOSURE, "the server has ended the connection")
        return ""
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _up(socket: ServerConnection, writer: asyncio.StreamWriter) -> str:
    """Pass on what the page sends until it leaves; return what it did wrong."""
    with contextlib.suppress(ConnectionClosed):
        async for message in socket:
            if isinstance(message, str):
                return "a WebSocket's text; SFL sends binary messages"
            writer.write(message)
            await writer.drain()
    return ""


async def _down(reader: asyncio.StreamReader, socket: ServerConnection) -> None:
    """Pass on what the server says until it has ended."""
    with contextlib.suppress(ConnectionClosed, OSError):
        while data := await reader.read(PIECE):
            await socket.send(data)


def _told(error: OSError | SflError) -> str:
    if isinstance(error, SflError):
        return reason_of(error)
    why = "it does not answer" if isinstance(error, TimeoutError) else reason_of(error)
    return f"the server behind this site is not there: {why}"


def _short(reason: str) -> str:
    return reason.encode()[:_MOST_REASON].decode(errors="ignore")
