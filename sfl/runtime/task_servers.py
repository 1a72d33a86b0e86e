"""A client's sides at the servers of further tasks: joined in the order of ``--tasks``."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from sfl.conversation.hop import shown
from sfl.conversation.party import ClientParty
from sfl.conversation.report import DataReport, send_report
from sfl.data.client_data import ClientData
from sfl.errors import ProtocolError, RunEnded, RunError, quoted, reason_of
from sfl.nodes import ClientNode
from sfl.runtime.access import Access, Registered, closing_with_reason, join_another
from sfl.strategy.recipe import Recipe
from sfl.wire.driver import Conversation
from sfl.wire.members import Channel
from sfl.wire.messages import MessageType


def at_each_server(data: ClientData, recipe: Recipe) -> list[ClientData]:
    """Return a client's data with the labels of each server's task, the main one's first.

    Raises:
        DataError: a task's labels are missing.
    """
    return [data.of_task(name) for name in recipe.tasks.names] or [data]


def join_task_servers(
    stack: contextlib.ExitStack, access: Access, node: ClientNode, registered: Registered
) -> Conversation[list[Registered]]:
    """Register at the servers of further tasks, in their order; ``stack`` closes the channels.

    Raises:
        ProtocolError: the main server has not told where one is.
    """
    told, names = registered.welcome.task_servers, registered.welcome.run.tasks.split(",")[1:]
    found = []
    for name in (name.strip() for name in names):
        if not (address := told.get(name)):
            raise ProtocolError(f"the server has not told where the server of {name} is")
        if address.rpartition("://")[0] != node.server.rpartition("://")[0]:
            raise ProtocolError(
                f"the server of {name} is at {quoted(address, 80)}, over another transport than"
                f" --server {node.server}: give --task-servers addresses of one kind"
            )
        join = functools.partial(join_another, access, node, registered, address, f"task {name}")
        other = yield from access.calls.run(join)
        stack.enter_context(other.link)
        stack.enter_context(closing_with_reason(other.link))
        stack.enter_context(_telling_of_the_end(other.link))
        found.append(other)
    return found


@contextlib.contextmanager
def _telling_of_the_end(channel: Channel) -> Iterator[None]:
    """Tell a task's server that the main server has ended the run."""
    try:
        yield
    except RunEnded as error:
        channel.dismiss(MessageType.END_RUN, reason_of(error))
        raise


def common_rounds(own: tuple[int, ...], others: Iterable[Registered]) -> tuple[int, ...]:
    """Return the rounds whose start lies here, and at all these servers.

    Raises:
        RunError: there is none.
    """
    for other in others:
        theirs = other.welcome.rounds
        both = tuple(r for r in theirs if r in own or not own)
        if not both:
            raise RunError(
                f"{other.link.peer_name} has what the rounds {shown(theirs)} start from, and others"
                f" {shown(own)}: start all where they ran before, with the same --out"
            )
        own = both
    return own


def add_sides(
    party: ClientParty,
    others: Sequence[Registered],
    data: Sequence[ClientData],
    reports: Sequence[DataReport],
) -> None:
    """Report the data with the task's labels to each server, and let the client train there.

    ``reports``: as they were before the samples were aligned.
    """
    recipes = party.recipe.at_each_server()[1:]
    for recipe, other, theirs, report in zip(recipes, others, data, reports, strict=True):
        other.link.limits = party.link.limits
        send_report(other.link, replace(report, num_samples=theirs.num_samples))
        party.others = (*party.others, party.at_server(recipe, other.link, theirs))


@contextlib.contextmanager
def closed_together(links: Sequence[Channel]) -> Iterator[None]:
    """Cut off all channels if the peer of one of them goes in the ``with`` block."""
    for link in links:
        link.companions = [other for other in links if other is not link]
    try:
        yield
    finally:
        for link in links:
            link.companions = ()
