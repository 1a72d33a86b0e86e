"""The JSON of a message: type, sender, receiver, position in the run, content."""

import json
import re
from typing import Any, Final, NamedTuple

from sfl.errors import ProtocolError, quoted
from sfl.files import strict_json

_MAX_NAME: Final = 128  # characters of a sender, a receiver, a run
_MAX_INDEX: Final = 2**31


class Envelope(NamedTuple):
    """The fields of a message's JSON."""

    type: str
    sender: str
    receiver: str
    at: tuple[str, int, int, int, int]  # run, round, step, client, link
    content: Any  # any JSON value
    checksum: str  # of the payload; "" without one


_NAMES: Final = ("type", "sender", "receiver", "run")
_INDICES: Final = ("round", "step", "client", "link")
_KINDS: Final = dict.fromkeys(_NAMES, str) | dict.fromkeys(_INDICES, int)
_ALONE: Final = frozenset({*_KINDS, "content"})
_WITH_PAYLOAD: Final = _ALONE | {"checksum"}
_PLAIN_NAME: Final = re.compile(rf"[A-Za-z0-9._ -]{{0,{_MAX_NAME}}}")


def write_envelope(envelope: Envelope) -> bytes:
    """Return the JSON of an envelope.

    Floats read back as the same float; ``NaN`` and ``Infinity`` (the loss of a diverged run) are
    written as Python's ``json`` does.
    """
    kind, sender, receiver, at, content, checksum = envelope
    fields = dict(zip(_KINDS, (kind, sender, receiver, *at), strict=True)) | {"content": content}
    if checksum:
        fields["checksum"] = checksum
    return json.dumps(fields, separators=(",", ":")).encode()


def read_envelope(text: bytes | bytearray, *, has_payload: bool) -> Envelope:
    """Return the envelope in a JSON text.

    Raises:
        ProtocolError: the text is malformed, a name is not plain, or an index is out of range.
    """
    try:
        fields = strict_json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"a message's JSON cannot be read: {error}") from error
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
