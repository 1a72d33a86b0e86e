"""Check whether a client could take part, before or during a run, without registering it.

::

    client (client_check)                            server (server_check)
    CHECK {client_id, fingerprint}               ->
                                                 <-  CHECKED {as REGISTERED, and place}
                                                 or  GO_TO, INVALID_MESSAGE: as REGISTER
    REQUEST_TO_START {as when it joins}          ->  if it has loaded its data
                                                 <-  CHECKED {problem}
    UNREGISTER                                   ->
                                                 <-  UNREGISTER

A client checks twice: first to learn the run's configuration, then, over a new connection, with its
data loaded. ``place`` says why its id is not free now, ``problem`` why the server would refuse its
report; "" if it would not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfl.conversation.join import (
    AskedAbout,
    Joined,
    Welcome,
    callers_of,
    check_stays,
    parse_hello,
    parse_welcome,
    welcome_content,
)
from sfl.conversation.report import DataReport, parse_report, send_report
from sfl.errors import ProtocolError
from sfl.wire.driver import Conversation
from sfl.wire.link import ANY_ID, Link, one_line
from sfl.wire.messages import Message, MessageType


@dataclass(frozen=True)
class Answer:
    """The server's answer to a check."""

    welcome: Welcome
    place: str  # why the client's id is not free now, or ""
    problem: str = ""  # why the server would refuse the report


def client_check(
    link: Link, wanted: int | None, fingerprint: Mapping[str, str], report: DataReport | None
) -> Conversation[Answer]:
    """Ask whether the server would accept a registration, and a report if one is given.

    Raises:
        Redirected: as ``client_join``.
    """
    wanted = ANY_ID if wanted is None else wanted
    content = {"client_id": wanted, "fingerprint": dict(fingerprint)}
    link.send_message_as_json(MessageType.CHECK, content=content)
    yield link
    reply = link.receive_message_as_json(MessageType.CHECKED, MessageType.GO_TO)
    check_stays(reply)
    welcome, place, problem = parse_welcome(link, reply, wanted), reply.get("place", str), ""
    if report is not None:
        send_report(link, report)
        yield link
        problem = link.receive_message_as_json(MessageType.CHECKED).get("problem", str)
    link.send_message_as_json(MessageType.UNREGISTER)
    yield link
    link.receive_message_as_json(MessageType.UNREGISTER)
    return Answer(welcome, one_line(place), one_line(problem))


def server_check(
    link: Link,
    hello: Message,
    welcome: Welcome,
    find: Callable[[int, AskedAbout | None], tuple[int, str]],
    why_refused: Callable[[Joined], str],
    *,
    aligns: bool = False,
    reported: Callable[[int], Mapping[str, Any]] = lambda client: {},
) -> Conversation[None]:
    """Answer a check; ``find`` returns the client's id and why it is not free now, or "".

    The server of a further task asks whether a client is registered, and what it has ``reported``.

    Raises:
        RunError: ``find`` knows no such client.
    """
    wanted, fingerprint = parse_hello(link, hello, callers_of(hello, welcome))
    about = AskedAbout.of(hello)
    client, place = find(wanted, about)
    content = welcome_content(client, welcome) | {"place": place}
    if about and not place:
        content["reported"] = reported(client)
    link.send_message_as_json(MessageType.CHECKED, content=content)
    yield link
    message = link.receive_message_as_json(MessageType.REQUEST_TO_START, MessageType.UNREGISTER)
    if message.type is MessageType.REQUEST_TO_START:
        try:
            report = parse_report(message, client, welcome.run, aligns=aligns)
            problem = why_refused(Joined(client, link, fingerprint, report))
        except ProtocolError as error:
            problem = str(error)
        link.send_message_as_json(MessageType.CHECKED, content={"problem": problem})
        yield link
        link.receive_message_as_json(MessageType.UNREGISTER)
