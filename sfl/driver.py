"""Running conversations: alone over a link that blocks, or many as their messages arrive.

A conversation is straight-line code that yields the link it is about to receive from. It computes
where it is resumed, so that one thread owns all the segments that it touches.
"""

from collections.abc import Collection, Generator, Mapping
from typing import Protocol, TypeVar

from sfl.link import Link

T = TypeVar("T")
Conversation = Generator[Link, None, T]


class Network(Protocol):
    """Several links, of which one can wait for whichever has a message."""

    def wait(self, links: Collection[Link]) -> Link:
        """Return one of ``links`` that has a message or has failed; block until there is one."""
        ...


def run_blocking(conversation: Conversation[T]) -> T:
    """Run a conversation over a link whose receives block."""
    while True:
        try:
            next(conversation)
        except StopIteration as end:
            result: T = end.value
            return result


def run_together(network: Network, conversations: Mapping[int, Conversation[T]]) -> dict[int, T]:
    """Run one conversation a client, each as its messages arrive; return what each returns."""
    results: dict[int, T] = {}
    waiting: dict[Link, int] = {}

    def resume(client: int) -> None:
        try:
            waiting[next(conversations[client])] = client
        except StopIteration as end:
            results[client] = end.value

    for client in conversations:
        resume(client)
    while waiting:
        resume(waiting.pop(network.wait(waiting)))
    return {client: results[client] for client in conversations}
