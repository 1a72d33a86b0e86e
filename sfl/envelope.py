"""The JSON of a message: its type, from whom to whom, where in a run it belongs, what it says.

It is written and read several times a step, between the arithmetic, where Python takes many times
as long as in a loop. So what is always the same is written once, and what reads as this module
writes it is taken apart by one pattern, in a third of the time; whatever else is JSON with these
fields is read all the same.
"""

import functools
import json
import re
from typing import Any, Final, NamedTuple

from sfl import strict_json
from sfl.errors import ProtocolError, quoted

_MAX_NAME: Final = 128  # of a sender, a receiver, a run
_MAX_INDEX: Final = 2**31


class Envelope(NamedTuple):
    """What a message's JSON says."""

    type: str
    sender: str
    receiver: str
    at: tuple[str, int, int, int, int]  # run, round, step, client, link
    content: Any  # any JSON value
    checksum: str  # of the payload; "" if there is none


_NAMES: Final = ("type", "sender", "receiver", "run")
_INDICES: Final = ("round", "step", "client", "link")
_KINDS: Final = dict.fromkeys(_NAMES, str) | dict.fromkeys(_INDICES, int)
_ALONE: Final = frozenset({*_KINDS, "content"})
_WITH_PAYLOAD: Final = _ALONE | {"checksum"}
_NAME: Final = rf"[A-Za-z0-9._ -]{{0,{_MAX_NAME}}}"
_PLAIN_NAME: Final = re.compile(_NAME)
# As ``write_envelope`` writes it, with the content "" or a flat object.
_WRITTEN: Final = re.compile(
    (
        "{"
        + "".join(f'"{name}":"({_NAME})",' for name in _NAMES)
        + "".join(f'"{name}":(-1|0|[1-9][0-9]{{0,9}}),' for name in _INDICES)
        + r'"content":(""|\{[^{}\[\]]*\})(?:,"checksum":"([a-z0-9:]+)")?\}'
    ).encode()
)
_to_json = json.JSONEncoder(separators=(",", ":")).encode


@functools.lru_cache(maxsize=1024)
def _names_to_json(*names: str) -> str:
    return _to_json(dict(zip(_NAMES, names, strict=True)))[:-1]


def write_envelope(envelope: Envelope) -> bytes:
    """Return the JSON.

    Floats are as Python's ``json`` writes them: reading gives the same float, and ``NaN`` and
    ``Infinity`` (the loss of a run that diverged) stand as such.
    """
    kind, sender, receiver, (run, at_round, step, client, link), content, checksum = envelope
    names = _names_to_json(kind, sender, receiver, run)
    said = '""' if content == "" else _to_json(content)
    # A checksum is text of ours, or has been compared with one.
    of_payload = f',"checksum":"{checksum}"' if checksum else ""
    return (
        f'{names},"round":{at_round:d},"step":{step:d},"client":{client:d},"link":{link:d},'
        f'"content":{said}{of_payload}}}'
    ).encode()


def read_envelope(text: bytes | bytearray, *, has_payload: bool) -> Envelope:
    """Return what a JSON text says.

    Raises:
        ProtocolError: it is no such text; a name is not plain, an index out of range.
    """
    if found := _WRITTEN.fullmatch(text):
        kind, sender, receiver, run, at_round, step, client, link, content, checksum = found.groups(
            b""
        )
        at = (run.decode(), int(at_round), int(step), int(client), int(link))
        if max(at[1:]) < _MAX_INDEX and bool(checksum) == has_payload:
            said = "" if content == b'""' else _loads(content)
            names = (kind.decode(), sender.decode(), receiver.decode())
            return Envelope(*names, at, said, checksum.decode())
    return _read_any(text, has_payload=has_payload)


def _loads(text: bytes | bytearray) -> Any:
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"a message's JSON cannot be read: {error}") from error


def _read_any(text: bytes | bytearray, *, has_payload: bool) -> Envelope:
    fields = _loads(text)
    if not isinstance(fields, dict):
        raise ProtocolError("a message's JSON is not an object")
    expected = _WITH_PAYLOAD if has_payload else _ALONE
    if fields.keys() != expected:
        odd = sorted(fields.keys() ^ expected)
        raise ProtocolError(f"a message's fields are not the protocol's: {quoted(odd[:4], 80)}")
    for name, wanted in _KINDS.items():
        if type(fields[name]) is not wanted:
            raise ProtocolError(f"a message's {name!r} is not of type {wanted.__name__}")
        if wanted is str and not _PLAIN_NAME.fullmatch(fields[name]):
            raise ProtocolError(
                f"a message's {name!r} is not up to {_MAX_NAME} letters, digits, '.', '_', '-', ' '"
            )
    for name in _INDICES:
        if not -1 <= fields[name] < _MAX_INDEX:
            raise ProtocolError(f"a message's {name!r} is out of range")
    if type(fields.get("checksum", "")) is not str:
        raise ProtocolError("a message's checksum is not text")
    kind, sender, receiver, run, *indices = (fields[name] for name in _KINDS)
    at = (run, *indices)
    return Envelope(kind, sender, receiver, at, fields["content"], fields.get("checksum", ""))
