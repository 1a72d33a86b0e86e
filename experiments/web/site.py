"""The site: one port with the page, what it asks for, and WebSockets to the servers behind it.

It runs in a thread of its own; the thread that started it is free to wait for a signal.
"""

import asyncio
import contextlib
import http
import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import parse_qsl

import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request

from experiments.web.carry import MOST_IN_MESSAGE, NotThere, Open, carry
from experiments.web.doors import MOST_WEBSOCKETS, BoundedListener, Doors, Visitor
from experiments.web.pages import KINDS, MOST_PARAMETERS, Pages, Response, refusal
from sfl.archive.run_folder import say
from sfl.errors import RunError, SflError, counted, reason_of
from sfl.transport.addresses import address_of
from sfl.transport.refusal_log import EVERY_S, RefusalLog

ANSWER_WITHIN_S = 300.0  # a request: making a model's file, and sending it over a slow link
SAY_GOODBYE_S = 3.0
AT_ONCE = 4  # requests of each kind that are computed
_SILENT = logging.Logger("experiments.web", logging.CRITICAL + 1)
Behind = Callable[[Mapping[str, str]], Open]  # given the query of a WebSocket's address


@dataclass(frozen=True)
class Parts:
    """What a site consists of."""

    pages: Pages
    behind: Mapping[str, Behind]  # the servers behind it, by path
    doors: Doors
    tls: ssl.SSLContext | None = None


class Site:
    """A running site. Ended by ``with``."""

    def __init__(self, parts: Parts, listener: BoundedListener, refusals: RefusalLog) -> None:
        self._parts, self._listener, self._refusals = parts, listener, refusals
        self.port: int = listener.getsockname()[1]
        # Kinds of requests have workers each: a server that is silent keeps no page from loading.
        self._workers = {kind: ThreadPoolExecutor(AT_ONCE, f"sfl-web-{kind}") for kind in KINDS}
        self._num_websockets = 0
        self._said_at: dict[str, float] = {}  # a line about a server that is not there
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._ready, self.has_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="site", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> "Site":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        for workers in self._workers.values():
            workers.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Raise what ended the site, if something did.

        Raises:
            RunError: it has ended.
        """
        if self.has_ended.is_set():
            raise RunError(f"the site has ended: {reason_of(self._error or RunError('stopped'))}")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - the edge of the thread
            self._error = error
        finally:
            self.has_ended.set()
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._log_fault)
        server = serve(
            self._handle,
            sock=self._listener,
            ssl=self._parts.tls,
            create_connection=Visitor,
            process_request=self._request,
            compression=None,
            server_header=None,
            open_timeout=ANSWER_WITHIN_S,
            max_size=MOST_IN_MESSAGE,
            max_queue=1,
            logger=_SILENT,
        )
        async with server as running:
            self._ready.set()
            await self._stop.wait()
            await self._say_goodbye(running)

    async def _say_goodbye(self, server: Server) -> None:
        server.close(reason="the site is ending")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAY_GOODBYE_S):
                await server.wait_closed()
        for task in server.handler_tasks:  # requests that are not answered yet
            task.cancel()

    def _log_fault(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, object]) -> None:
        error = context.get("exception")
        told = reason_of(error) if isinstance(error, BaseException) else context.get("message")
        self._refusals.add("a connection", f"a fault: {told}")

    async def _request(self, visitor: ServerConnection, request: Request) -> object:
        """Return the response to a request; None opens a WebSocket."""
        assert isinstance(visitor, Visitor)  # ``create_connection``
        self._listener.has_asked(visitor.transport.get_extra_info("socket").fileno())
        host = request.headers.get_all("Host")
        is_websocket = bool(request.headers.get_all("Upgrade"))
        response = self._parts.doors.refused(request, is_websocket=is_websocket)
        path, _, query = request.path.partition("?")
        if response is None and is_websocket:
            response = self._opening(visitor, path, query)
            if response is None:
                return None
        elif response is None:
            packs = any("gzip" in value for value in request.headers.get_all("Accept-Encoding"))
            response = await asyncio.get_running_loop().run_in_executor(
                self._workers[self._parts.pages.kind_of(path)],
                lambda: self._parts.pages.respond(request.path, accepts_gzip=packs),
            )
            has_body = request.method != "HEAD"
            return self._sent(response, host[0], has_body=has_body)
        self._refusals.add(_address(visitor), response.body.decode())
        return self._sent(response, "localhost")  # the host of the request may be anything

    def _opening(self, visitor: Visitor, path: str, query: str) -> Response | None:
        if path not in self._parts.behind:
            known = " and ".join(self._parts.behind)
            return refusal(http.HTTPStatus.NOT_FOUND, f"there is no such WebSocket: {known}")
        if self._num_websockets >= MOST_WEBSOCKETS:
            why = f"{counted(MOST_WEBSOCKETS, 'WebSocket')} are open: try again later"
            return refusal(http.HTTPStatus.SERVICE_UNAVAILABLE, why)
        try:
            given = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_PARAMETERS))
            visitor.let_in(self._parts.behind[path](given))
        except (SflError, ValueError) as error:
            return refusal(http.HTTPStatus.BAD_REQUEST, reason_of(error))
        return None

    def _sent(self, response: Response, host: str, *, has_body: bool = True) -> object:
        age = f"max-age={response.max_age_s}" if response.max_age_s else "no-cache"
        headers = Headers(
            {
                "Content-Type": response.content_type,
                "Content-Length": str(len(response.body)),
                "Cache-Control": age,
                "Vary": "Accept-Encoding",
                "Connection": "close",
            }
            | self._parts.doors.headers(host)
            | ({"Content-Encoding": "gzip"} if response.packed else {})
        )
        body = response.body if has_body else b""
        status = response.status
        return websockets.http11.Response(status.value, status.phrase, headers, body)

    async def _handle(self, visitor: ServerConnection) -> None:
        assert isinstance(visitor, Visitor)
        self._num_websockets += 1
        address = _address(visitor)  # a closed connection has none
        try:
            why = await carry(visitor, visitor.open_server)
            if why:
                self._refusals.add(address, why)
        except NotThere as error:
            self._say_not_there(f"{visitor.request.path.partition('?')[0]}: {error}")
        except OSError as error:
            self._refusals.add(address, reason_of(error))
        finally:
            self._num_websockets -= 1

    def _say_not_there(self, line: str) -> None:
        """Say that a server behind the site does not answer; pages ask again and again."""
        now = time.monotonic()
        if now - self._said_at.get(line, -EVERY_S) >= EVERY_S:
            self._said_at[line] = now
            say(line)


def _address(visitor: ServerConnection) -> str:
    return address_of(visitor.transport.get_extra_info("socket"))
