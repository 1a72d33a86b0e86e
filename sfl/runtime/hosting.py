"""Host many clients in one process, one connection each: ``run_client.py --client-ids 0-99``.

Their conversations run in one thread, each as its messages arrive; other threads connect and move
bytes. The clients share the data set in memory; each has its own folder and log.
"""

import contextlib
import dataclasses

from sfl.archive.run_folder import say
from sfl.errors import counted, reason_of
from sfl.nodes import ClientNode
from sfl.runtime.access import Access
from sfl.runtime.client import take_part_in
from sfl.runtime.client_process import ClientProcess, devices_of
from sfl.transport.guard import max_open_files
from sfl.transport.tokens import tokens_of
from sfl.transport.transports import transport_to
from sfl.wire.blocking_calls import Calls
from sfl.wire.driver import Conversation, run_together
from sfl.wire.link import one_line
from sfl.wire.messages import MessageType


def host(node: ClientNode) -> None:
    """Take part in one run as several clients; a failed client does not stop the others.

    Raises:
        The error of the failed client with the lowest id, as ``client.take_part``.
    """
    max_open_files()  # raises the process's limit of open files
    hosted, failures = node.hosted, dict[int, Exception]()

    def one_client(client: int) -> Conversation[None]:
        try:
            own = dataclasses.replace(node, client_id=client, client_ids="")
            yield from take_part_in(process, own)
        except Exception as error:  # noqa: BLE001 - the edge of one client; raised below
            failures[client] = error
            say(f"client_{client}: {one_line(reason_of(error))}")

    with transport_to(node.server).clients(node, say) as network:
        access = Access(tokens_of(node), network, Calls(network.wake, len(hosted)))
        process = ClientProcess(access, devices_of(node), hosted)
        clients = {k: one_client(k) for k in hosted}
        say(f"{counted(len(hosted), 'client')} in this process: {node.client_ids}")
        try:
            run_together(network, {k: clients[k].__iter__ for k in hosted})
        except KeyboardInterrupt as error:
            network.end("interrupted", MessageType.UNREGISTER)
            for conversation in clients.values():
                with contextlib.suppress(KeyboardInterrupt):
                    conversation.throw(error)
            raise
    if failures:
        raise failures[min(failures)]
    say("the run is over")
