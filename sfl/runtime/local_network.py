"""The network of a simulation: links within the process, and clients that are away for a time."""

import dataclasses
import itertools
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sfl.errors import ConfigError, ConnectionLost, SflError, quoted
from sfl.wire.driver import Conversation, Gate, NoReconnects
from sfl.wire.framing import encode_head
from sfl.wire.link import Link
from sfl.wire.messages import Message


class LocalLink(Link):
    """One end of a link within a process; counts the bytes that a socket would carry."""

    in_process = True

    def __init__(self, name: str, peer_name: str) -> None:
        super().__init__(name, peer_name)
        self.inbox: deque[Message] = deque()
        self.peer: LocalLink = self
        self.is_lost = False

    def _send(self, message: Message) -> int:
        head_bytes = len(encode_head(message))
        num_bytes = head_bytes + len(message.payload)
        self.counters.bytes_sent += num_bytes
        self.counters.messages_sent += 1
        self.peer.counters.bytes_received += num_bytes
        self.peer.counters.messages_received += 1
        self.peer.inbox.append(dataclasses.replace(message, head_bytes=head_bytes))
        return num_bytes

    def _next(self) -> Message:
        if self.is_lost:
            raise ConnectionLost(f"{self.peer_title} is away")
        return self.inbox.popleft()


def local_pair(client: int) -> tuple[LocalLink, LocalLink]:
    """Return the server's and the client's end of a link."""
    server, end = LocalLink("server", f"client_{client}"), LocalLink(f"client_{client}", "server")
    server.peer, end.peer = end, server
    return server, end


@dataclass(frozen=True)
class Away:
    """A client's absence, as with ``--on-missing skip`` but without the wait."""

    client: int
    round: int  # in which the client is lost
    step: int = 0  # before which the client is lost
    back: int | None = None  # the round in which it returns; None: never

    @classmethod
    def parse(cls, text: str) -> "Away":
        """Parse ``CLIENT:ROUND[.STEP][-BACK]``.

        Raises:
            ConfigError: the text has another form.
        """
        found = re.fullmatch(r"(\d+):(\d+)(?:\.(\d+))?(?:-(\d+))?", text, re.ASCII)
        if not found:
            raise ConfigError(f"--away {quoted(text, 40)}: give CLIENT:ROUND[.STEP][-BACK], from 0")
        client, first, step, back = (int(n) if n else None for n in found.groups())
        assert client is not None
        assert first is not None
        if back is not None and back <= first:
            raise ConfigError(f"--away {text}: BACK must be {first + 1} or more")
        return cls(client, first, step or 0, back)


class _Running:
    """A conversation of a client or hop, up to the next message or gate that it waits for."""

    def __init__(self, conversation: Conversation[None]) -> None:
        self._conversation = conversation
        self._due: Link | Gate | None = None  # None: it has not begun
        self._is_over = False

    def is_ready(self) -> bool:
        """Return whether it can go on."""
        if self._is_over or self._due is None:
            return not self._is_over
        return _has_message(self._due) if isinstance(self._due, Link) else self._due()

    def resume(self) -> None:
        try:
            self._due = next(self._conversation)
        except StopIteration:
            self._is_over = True


class LocalNetwork(NoReconnects):
    """Runs the clients whenever the server waits for them; simulates absences."""

    def __init__(self, away: Sequence[Away] = ()) -> None:
        self._away = list(away)
        self._behind: dict[Link, list[_Running]] = {}  # by the server's end of the link
        self._out: set[int] = set()
        self.bring_back: Callable[[int], None] = lambda client: None

    def add(self, link: LocalLink, *chain: Conversation[None]) -> None:
        """Add the conversations behind a link of the server: a client's, then those of hops."""
        self._behind[link] = [_Running(conversation) for conversation in chain]

    def start_round(self, round_index: int) -> None:
        for away in tuple(self._away):
            if away.back == round_index and away.client in self._out:
                self._away.remove(away)
                self._out.remove(away.client)
                self.bring_back(away.client)

    def is_here(self, client: int) -> bool:
        return client not in self._out

    def is_skipped(self, client: int) -> bool:
        return client in self._out

    def lost(self, client: int, error: SflError) -> None:
        if not isinstance(error, ConnectionLost):
            raise error
        self._out.add(client)

    def decide_skip(self, client: int) -> bool:
        return True

    def why_away(self, client: int) -> str:
        return "away"

    def wait(self, links: Collection[Link], gates: Collection[Gate]) -> Link | None:
        """Run the first link's client until it has sent a message; return the link.

        Where hops stand in between, another client's step may have to be taken first, by a hop or
        by the server: then its link is returned.
        """
        first, *_ = links
        link = self._run_until_sent(first) or next(filter(_has_message, links), None)
        assert isinstance(link, LocalLink), "the server waits for a client that has ended"
        at = link.inbox[0].at
        link.is_lost = any(
            (at.client, at.round) == (away.client, away.round)
            and (at.step >= away.step or at.step < 0)
            for away in self._away
        )
        return link

    def _run_until_sent(self, link: Link) -> Link | None:
        """Run conversations, first those behind a link, until it has a message; else None."""
        others = [chain for other, chain in self._behind.items() if other is not link]
        running = [*self._behind[link], *itertools.chain(*others)]
        while not _has_message(link):
            ready = next((one for one in running if one.is_ready()), None)
            if ready is None:
                return None
            ready.resume()
        return link


def _has_message(link: Link) -> bool:
    assert isinstance(link, LocalLink)
    return bool(link.inbox)
