"""Whom a server tells who is missing, and how often."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from sfl.runtime import roster as module
from sfl.runtime.client_places import Place
from sfl.runtime.roster import TELL_EVERY_S, Roster
from sfl.wire.messages import MessageType


@dataclass
class Heard:
    lines: list[str] = field(default_factory=list)

    def send_message_as_json(self, message_type: MessageType, *, content: str) -> None:
        self.lines.append(content)


def test_clients_that_come_at_once_are_told_of_the_last_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    roster, first = Roster("r", frozenset(range(20)), 20), Heard()
    for k in range(19):
        link = cast(Any, first if k == 0 else Heard())
        roster.places[k] = Place(link=link, ready=True)
        roster.notify()
    assert len(first.lines) == 1
    assert first.lines[0].startswith("waiting for 19 of 20 clients: 1, 2, 3, 4, 5, 6, 7, 8, ...")
    roster.notify_if_due()
    assert len(first.lines) == 1
    now += TELL_EVERY_S
    for _ in range(2):
        roster.notify_if_due()
    assert first.lines[1:] == ["waiting for 1 of 20 clients: 19"]
