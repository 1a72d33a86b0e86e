"""Running conversations: alone over a link that blocks, or many as their messages arrive.

A conversation is straight-line code that yields the link it is about to receive from, or a gate:
what it waits for among the other conversations. It computes where it is resumed, so that one thread
owns all the segments that it touches.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Protocol, TypeVar

from sfl.link import Link

T = TypeVar("T")
Gate = Callable[[], bool]  # whether it is open
Conversation = Generator[Link | Gate, None, T]


class Network(Protocol):
    """Several links, of which one can wait for whichever has a message."""

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Return one of ``links`` that has a message or has failed; block until there is one.

        None if a gate has opened instead: ``wake`` says so.
        """
        ...

    def wake(self) -> None:
        """Look at the gates again; called from other threads."""
        ...


def run_blocking(conversation: Conversation[T]) -> T:
    """Run a conversation without gates over a link whose receives block."""
    while True:
        try:
            next(conversation)
        except StopIteration as end:
            result: T = end.value
            return result


def run_together(network: Network, conversations: Mapping[int, Conversation[T]]) -> dict[int, T]:
    """Run one conversation a client, each as its messages arrive; return what each returns."""
    results: dict[int, T] = {}
    receiving: dict[Link, int] = {}
    held: dict[int, Gate] = {}

    def resume(client: int) -> None:
        try:
            due = next(conversations[client])
        except StopIteration as end:
            results[client] = end.value
            return
        if isinstance(due, Link):
            receiving[due] = client
        else:
            held[client] = due

    for client in conversations:
        resume(client)
    while receiving or held:
        free = next((client for client, gate in held.items() if gate()), None)
        if free is not None:
            del held[free]
        elif link := network.wait(receiving, held.values()):
            free = receiving.pop(link)
        if free is not None:
            resume(free)
    return {client: results[client] for client in conversations}
