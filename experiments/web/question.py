"""What the site asks the server of ``--train``: which run it has."""

import dataclasses
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final

import torch

from sfl.conversation.check import client_check
from sfl.conversation.join import Welcome
from sfl.environment import fingerprint
from sfl.errors import RunError
from sfl.nodes import ClientNode
from sfl.runtime.access import Access
from sfl.transport.tokens import SERVER
from sfl.transport.transports import transport_to
from sfl.wire.driver import run_blocking
from sfl.wire.link import ANY_ID, CLIENT, Peer

ASK_AGAIN_S: Final = 2.0  # the server is asked for its run so often at most
CONNECT_WITHIN_S: Final = 5.0
SILENT_S: Final = 5.0  # of a server that is asked, until it counts as lost
WAIT_S: Final = 3.0  # for its answer, from the question on; a page asks again


class Question:
    """One question to a server. Nobody waits long for its thread, not even the end of the site."""

    def __init__(self, address: str, node: ClientNode) -> None:
        self._address, self._node = address, node
        self._until = time.monotonic() + WAIT_S
        self._answered = 0.0
        self._answer: Future[Welcome] = Future()
        threading.Thread(target=self._ask, name="sfl-web-question", daemon=True).start()

    def _ask(self) -> None:
        try:
            answer = asked_run(self._address, self._node)
        except BaseException as error:  # noqa: BLE001 - raised by ``answer``
            self._answered = time.monotonic()
            self._answer.set_exception(error)
        else:
            self._answered = time.monotonic()
            self._answer.set_result(answer)

    @property
    def is_old(self) -> bool:
        """Whether it was answered, or failed, some time ago."""
        return self._answer.done() and time.monotonic() - self._answered >= ASK_AGAIN_S

    def answer(self) -> Welcome:
        """Return what the server has answered.

        Raises:
            ConfigError, RunError, PeerFailed, ProtocolError: it is not there, refuses, or is late.
        """
        try:
            return self._answer.result(max(0.0, self._until - time.monotonic()))
        except FutureTimeout:
            raise RunError(
                f"{self._address} does not answer: is it a server that trains?"
            ) from None


def asked_run(address: str, node: ClientNode) -> Welcome:
    """Return what a server that trains answers to a check.

    Raises:
        ConfigError, RunError, PeerFailed, ProtocolError: it is not there, or refuses.
    """
    node = dataclasses.replace(
        node, server=address, connect_timeout=CONNECT_WITHIN_S, peer_timeout=SILENT_S
    )
    with transport_to(address).client(node, lambda line: None) as dialler:
        access = Access.of(node, dialler)
        link = access.connect(address, node)
        link.peer_name = "server"
        with link:
            wanted = access.tokens.only_client if access.tokens else None
            peer = Peer(CLIENT, ANY_ID if wanted is None else wanted)
            access.authenticate(link, peer, SERVER)
            ours = fingerprint(torch.device("cpu"))
            return run_blocking(client_check(link, wanted, ours, None)).welcome
