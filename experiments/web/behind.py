"""The servers behind the site: how a WebSocket's bytes get to them.

To a server that trains, the site is let in with its own token and certificate authority, before the
first byte of the page: a page has neither.
"""

import asyncio
import contextlib
from collections.abc import Mapping

from experiments.web.carry import PIECE, Ends, Open
from experiments.web.site import Behind
from sfl.errors import ConfigError, ConnectionLost, ProtocolError, quoted
from sfl.nodes import ClientNode
from sfl.transport.addresses import parse_address, parse_url
from sfl.transport.certificates import certificate_hash, client_tls
from sfl.transport.tokens import SERVER, client_authenticate, tokens_of
from sfl.wire.driver import Conversation
from sfl.wire.framing import Decoder, encode_head
from sfl.wire.link import ANY_ID, CLIENT, Link, Peer
from sfl.wire.messages import Limits, Message, MessageType


def service_of(address: str) -> Behind:
    """Return the way to a service on this machine."""
    host, port = parse_address(address)

    async def open_server() -> Ends:
        return await asyncio.open_connection(host, port, limit=PIECE)

    return lambda given: open_server


def trainer_of(address: str, node: ClientNode) -> Behind:
    """Return the way to a server that trains.

    Raises:
        ConfigError: the address is malformed, or of a transport that has no way for a page; the
            file of tokens or certificates cannot be used.
    """
    where = parse_url(address)  # a server over WebSocket lets plain TCP in as well
    if where.transport not in ("tcp", "ws", "wss"):
        raise ConfigError(f"--train {address}: give HOST:PORT of a server over tcp or ws")
    if where.transport == "wss" and not node.tls_ca:
        raise ConfigError(f"--train {address}: give --tls-ca, which its certificate is signed by")
    tokens, tls = tokens_of(node), client_tls(node)

    def behind(given: Mapping[str, str]) -> Open:
        client = _client_in(given)
        if tokens is not None and client == ANY_ID and tokens.only_client is not None:
            client = tokens.only_client

        async def open_server() -> Ends:
            reader, writer = await asyncio.open_connection(
                where.host, where.port, limit=PIECE, ssl=tls
            )
            try:
                if tokens is not None:
                    link = _Asked(reader, writer)
                    peer = Peer(CLIENT, client)
                    await link.converse(client_authenticate(link, tokens, peer, listener=SERVER))
            except BaseException:
                writer.close()
                raise
            return reader, writer

        return open_server

    return behind


def _client_in(given: Mapping[str, str]) -> int:
    """Return the client that a page asks to be; any, if it does not say.

    Raises:
        ConfigError: it says nonsense.
    """
    text = given.get("client", "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise ConfigError(f"client={quoted(text)}: give the number of a client, from 0")
    return int(text) if text else ANY_ID


class _Asked(Link):
    """A server that one conversation is held with, over asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__("client", "server")
        self._reader, self._writer = reader, writer
        self._decoder = Decoder(Limits())
        self._arrived: Message | None = None
        tls = writer.get_extra_info("ssl_object")
        self.certificate = certificate_hash(tls.getpeercert(binary_form=True)) if tls else b""

    async def converse(self, conversation: Conversation[str]) -> None:
        """Hold a conversation to its end.

        Raises:
            SflError: as the conversation; the server has gone, or says nonsense.
        """
        with contextlib.suppress(StopIteration):
            while True:
                next(conversation)
                await self._writer.drain()
                await self._await_message()
        await self._writer.drain()

    def _send(self, message: Message) -> int:
        data = encode_head(message)
        self._writer.write(data)
        return len(data)

    def _next(self) -> Message:
        message, self._arrived = self._arrived, None
        assert message is not None
        return message

    async def _await_message(self) -> None:
        while (message := self._decoder.next_message()) is None or _is_idle(message):
            if message is not None:
                continue
            with self._decoder.get_buffer() as buffer:
                data = await self._reader.read(len(buffer))
                buffer[: len(data)] = data
            if not data:
                raise ConnectionLost("the server has closed the connection")
            self._decoder.advance(len(data))
        if self._decoder.inside:  # it has spoken before it was asked
            raise ProtocolError("the server says more than it was asked")
        self._arrived = message


def _is_idle(message: Message) -> bool:
    return message.type is MessageType.HEARTBEAT
