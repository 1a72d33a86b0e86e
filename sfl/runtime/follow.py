"""Start a party that follows the main server: open its port, and pass it the connections."""

import contextlib

from sfl.archive.run_folder import say
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import ServerNode
from sfl.runtime.follower_kinds import kind_of
from sfl.runtime.following import MOST_CLIENTS, Following
from sfl.transport.guard import Terms, guard_of
from sfl.transport.heartbeat import interval_s
from sfl.transport.refusal_log import RefusalLog
from sfl.transport.tokens import next_tokens_of
from sfl.transport.transports import transport_of, transport_to


def follow(run: RunConfig, node: ServerNode) -> None:
    """Run a follower of the main server for one run.

    Raises:
        ConfigError: the options cannot be used together, or on this machine.
        RunError: the port, the folder or the disk cannot be used.
    """
    if run != RunConfig():
        raise ConfigError(f"--role {node.role}: the server has the options of the run; leave out")
    kind = kind_of(node.role)
    transport = transport_of(node)
    transport_to(node.next)  # a bad address fails at once
    tokens = next_tokens_of(node)
    guard = guard_of(node, kind.listener(node.role), MOST_CLIENTS)
    terms = Terms(
        node.peer_timeout, max_unregistered=64 + 2 * MOST_CLIENTS,
        heartbeat_s=interval_s(node.peer_timeout),
    )  # fmt: skip
    with (
        transport.listen(node, MOST_CLIENTS) as listener,
        transport.serve(listener, terms, guard, RefusalLog(say)) as network,
        contextlib.ExitStack() as stack,
    ):
        for line in transport.notes(node):
            say(line)
        name = node.role.replace(":", " ")
        say(f"{name}: listening on {listener.address}; {kind.beyond} {node.next}")
        dialler = transport.dial(network, node, say)
        Following(kind, node, network, dialler, stack, tokens).run()
