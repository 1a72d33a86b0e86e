"""The JSON of a message: what is written, what is read, what is refused."""

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import ProtocolError
from sfl.wire.envelope import Envelope
from sfl.wire.envelope import read_envelope as read
from sfl.wire.envelope import write_envelope as write

AT = ("run.1", 3, 17, 0, 0)
STEP = Envelope("TRAINING_FEATURES", "client_0", "server", AT, "", "crc32:0a1b2c3d")
ANSWER = STEP._replace(type="TRAINING_GRADS", content={"loss": 2.302585092994046, "correct": 17})
NAMES = st.text("abcXYZ019._- ", max_size=30)
INDICES = st.integers(-1, 2**31 - 1)
FLAT = st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.floats() | st.text(max_size=5))
ENVELOPES = st.builds(
    Envelope, NAMES, NAMES, NAMES, st.tuples(NAMES, INDICES, INDICES, INDICES, INDICES),
    st.just("") | FLAT | st.lists(FLAT), st.sampled_from(["", "crc32:00ff00ff", "Sum"]),
)  # fmt: skip


def fields_of(envelope: Envelope) -> dict[str, Any]:
    names = ("type", "sender", "receiver", "run", "round", "step", "client", "link", "content")
    kind, sender, receiver, at, content, checksum = envelope
    fields = dict(zip(names, (kind, sender, receiver, *at, content), strict=True))
    return fields | ({"checksum": checksum} if checksum else {})


@given(ENVELOPES)
def test_what_is_written_is_what_json_writes(envelope: Envelope) -> None:
    assert write(envelope) == json.dumps(fields_of(envelope), separators=(",", ":")).encode()


@given(ENVELOPES)
def test_what_is_written_is_read(envelope: Envelope) -> None:
    found = read(write(envelope), has_payload=bool(envelope.checksum))
    assert repr(found) == repr(envelope)  # a NaN differs from itself


@given(
    ENVELOPES | st.sampled_from([STEP, ANSWER]),
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from(b'0-9.aE\\"{}[],: \xff\n\x00'))),
    st.booleans(),
)
def test_what_has_changed_is_read_or_refused(
    envelope: Envelope, changes: list[tuple[int, int]], has_payload: bool
) -> None:
    text = bytearray(write(envelope))
    for place, byte in changes:
        text[place % len(text)] = byte
    with contextlib.suppress(ProtocolError):
        found = read(text, has_payload=has_payload)
        assert repr(read(write(found), has_payload=has_payload)) == repr(found)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"step":17', b'"step":2147483648', "out of range"),
        (b'"step":17', b'"step":-2', "out of range"),
        (b'"step":17', b'"step":017', "cannot be read"),
        (b'"step":17', b'"step":1e1', "not of type int"),
        (b'"step":17', b'"step":true', "not of type int"),
        (b"run.1", b"run/1", "letters, digits"),
        (b"run.1", b"r" * 129, "up to 128 letters"),
        (b"run.1", b"run\\u0000", "letters, digits"),
        (b'"content":', b'"content":"","content":', "twice"),
        (b'"correct":17', b'"loss":17', "twice"),
        (b'"correct":17', b'"correct":1e999', "no float"),
        (b'"correct":17', b'"correct":1' + b"0" * 30, "31 digits"),
        (b'"correct":17', b'"correct":"\\ud800"', "cannot be read"),
        (b'"correct":17', b'"correct":17}{', "cannot be read"),
        (b',"checksum":"crc32:0a1b2c3d"', b"", "fields are not the protocol's"),
        (b'"checksum":"', b'"checksum":"","checksum":"', "twice"),
        (b"}", b"} ", None),  # JSON that we would not write
        (b'"step":17', b'"step": 17', None),
        (b'"client_0"', b'"\\u0063lient_0"', None),
    ],
)
def test_what_is_refused_and_what_is_not(old: bytes, new: bytes, reason: str | None) -> None:
    text = write(ANSWER)
    changed = text.replace(old, new)
    assert changed != text
    if reason is None:
        assert read(changed, has_payload=True) == ANSWER
        return
    with pytest.raises(ProtocolError, match=reason):
        read(changed, has_payload=True)


@pytest.mark.parametrize("more", [b"x", b"}", b"{}", b"\0"])
def test_nothing_may_follow(more: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        read(write(ANSWER) + more, has_payload=True)


def test_a_message_without_a_file_has_no_checksum() -> None:
    with pytest.raises(ProtocolError, match="fields are not the protocol's"):
        read(write(STEP), has_payload=False)


def test_a_run_that_diverged_says_so() -> None:
    found = read(write(ANSWER._replace(content={"loss": math.nan})), has_payload=True)
    assert math.isnan(found.content["loss"])
