"""Many clients in one process, one connection each: ``run_client.py --client-ids 0-99``.

Each is a thread that does what a process of its own would do; they share the data set in memory,
and compute one at a time (``sfl.runtime.turn``). Each has its own folder and log.
"""

import dataclasses
import threading
import time

from sfl.archive.run_folder import say
from sfl.environment import set_up_torch
from sfl.errors import counted, reason_of
from sfl.nodes import ClientNode
from sfl.runtime.access import Access
from sfl.runtime.client import take_part_on
from sfl.runtime.machine import Machine
from sfl.runtime.turn import Turn
from sfl.transport.guard import most_files
from sfl.wire.link import one_line

END_WITHIN_S = 10.0  # after an interrupt; who is connecting just then is not waited for any longer


def host(node: ClientNode) -> None:
    """Take part in one run as several clients; who fails does not keep the others from going on.

    Raises:
        What the first client that failed has met; as ``client.take_part``.
    """
    most_files()  # asks for more than few
    turn = Turn()
    access = dataclasses.replace(Access.of(node), aside=turn.aside)
    machine = Machine(access, set_up_torch(node), num_hosted=len(node.hosted))
    failures: dict[int, BaseException] = {}

    def run(client: int) -> None:
        try:
            with turn:
                take_part_on(machine, dataclasses.replace(node, client_id=client, client_ids=""))
        except BaseException as error:  # noqa: BLE001 - the thread's edge; raised below
            failures[client] = error
            say(f"client_{client}: {one_line(reason_of(error))}")

    threads = [
        threading.Thread(target=run, args=[k], name=f"client_{k}", daemon=True) for k in node.hosted
    ]
    say(f"{counted(len(threads), 'client')} in this process: {node.client_ids}")
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        machine.interrupt()
        deadline = time.monotonic() + END_WITHIN_S
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        raise
    if failures:
        raise failures[min(failures)]
    say("the run is over")
