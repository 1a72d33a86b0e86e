"""Frames: any cutting of the stream gives the same messages; garbage gives only our errors."""

import contextlib
import json
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfl
from sfl.errors import Damaged, IntegrityError, OtherVersion, ProtocolError
from sfl.files.checksum import crc32
from sfl.values import Position
from sfl.wire.framing import HEAD, RELEASES, VERSION, Decoder, encode_head, pack_head
from sfl.wire.messages import FILE_TYPES, Limits, Message, MessageType

LIMITS = Limits(payload_bytes=dict.fromkeys(FILE_TYPES, 20_000))


def frame(message: Message) -> bytes:
    return encode_head(message) + bytes(message.payload)


def raw_frame(fields: object, payload: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return pack_head(len(text), len(payload), crc=crc32(text)) + text + payload


def decode(stream: bytes, cuts: list[int], limits: Limits = LIMITS) -> list[Message]:
    """Feed a stream in pieces and return the messages."""
    decoder, messages = Decoder(limits), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        piece = memoryview(stream)[start:end]
        while piece:
            with decoder.get_buffer() as buffer:
                assert len(buffer) > 0
                num_bytes = min(len(buffer), len(piece))
                buffer[:num_bytes] = piece[:num_bytes]
            decoder.advance(num_bytes)
            piece = piece[num_bytes:]
            while (message := decoder.next_message()) is not None:
                messages.append(message)
    return messages


texts = st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
indices = st.integers(-1, 2**31 - 1)
names = st.text("abcXYZ019._- ", max_size=30)
positions = st.builds(Position, names, indices, indices, indices, indices)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(MessageType))
    payload = b""
    if kind in FILE_TYPES:
        payload = draw(st.binary(min_size=1, max_size=64)) * draw(st.integers(1, 300))
    content = draw(json_values)
    return Message(kind, draw(names), draw(names), content, draw(positions), payload)


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[list[Message], bytes, list[int]]:
    sent = draw(st.lists(messages(), min_size=1, max_size=4))
    stream = b"".join(frame(message) for message in sent)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=12))
    return sent, stream, sorted(cuts)


@given(cut_streams())
def test_any_cutting_of_the_stream_gives_the_same_messages(
    cut_stream: tuple[list[Message], bytes, list[int]],
) -> None:
    sent, stream, cuts = cut_stream
    assert decode(stream, cuts) == sent


@given(st.lists(messages(), min_size=1, max_size=2))
@settings(max_examples=20)
def test_single_bytes_give_the_same_messages(sent: list[Message]) -> None:
    stream = b"".join(frame(message) for message in sent)
    assert decode(stream, list(range(1, len(stream)))) == sent


@given(st.binary(max_size=400))
def test_garbage_raises_only_protocol_errors(garbage: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert decode(garbage, []) == []


@given(cut_streams(), st.data())
def test_a_mutated_stream_raises_only_our_errors(
    cut_stream: tuple[list[Message], bytes, list[int]], data: st.DataObject
) -> None:
    _, stream, _ = cut_stream
    mutated = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        mutated[where] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError, IntegrityError):
        decode(bytes(mutated), [])


@given(st.binary(max_size=200))
def test_garbage_behind_a_good_head_raises_only_protocol_errors(text: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert decode(raw_frame(text), []) == []


FIELDS = {
    "type": "MESSAGE", "sender": "", "receiver": "", "run": "", "round": -1, "step": -1,
    "client": -1, "link": 0, "content": "",
}  # fmt: skip


def test_brackets_in_texts_are_no_depth() -> None:
    text = '[{"\\' * 30
    (message,) = decode(raw_frame({**FIELDS, "content": [text, [[[[[[text]]]]]]]}), [])
    assert message.content == [text, [[[[[[text]]]]]]]


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak"),
        (pack_head(2, 0, version=9), "it runs another release .protocol 9"),
        (pack_head(2, 0, flags=1), "flags"),
        (pack_head(2**31, 0), "bytes of JSON"),
        (pack_head(2, 2**63), "payload of 9223372036854775808 bytes"),
        (raw_frame(b"\xff\xff"), "cannot be read"),
        (raw_frame(b"[" * 60_000), "nested more than 16 deep"),
        (raw_frame({**FIELDS, "content": json.loads("[" * 16 + "]" * 16)}), "nested more than 16"),
        (raw_frame(b"1" * 10_000), "an integer of 10000 digits"),
        (raw_frame(b'{"round": 1e999}'), "no float holds"),
        (raw_frame({**FIELDS, "sender": "a\0b"}), "'sender' is not up to 128 letters"),
        (raw_frame({**FIELDS, "receiver": "a\nb"}), "'receiver' is not up to"),
        (raw_frame({**FIELDS, "run": "../x"}), "'run' is not up to"),
        (raw_frame({**FIELDS, "run": "x" * 129}), "'run' is not up to"),
        (raw_frame([]), "not an object"),
        (raw_frame({**FIELDS, "more": 1}), "more"),
        (raw_frame({**FIELDS, "round": 2**31}), "out of range"),
        (raw_frame({**FIELDS, "round": 1e999}), "not of type int"),
        (raw_frame({**FIELDS, "round": True}), "not of type int"),
        (raw_frame({**FIELDS, "type": "NO_SUCH_TYPE"}), "NO_SUCH_TYPE"),
        (raw_frame(json.dumps(FIELDS).encode().replace(b'"step"', b'"round"')), "twice"),
        (raw_frame({**FIELDS, "type": "TRAINING_LABELS"}), "without its file"),
        (raw_frame({**FIELDS, "checksum": ""}, b"x"), "carries a payload"),
        (
            raw_frame(
                {**FIELDS, "type": "SEND_MODEL", "checksum": "crc32:00000000"}, b"x" * 20_001
            ),
            "at most 20000",
        ),
    ],
)
def test_a_bad_frame_is_refused_with_its_reason(stream: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode(stream, [])


def test_a_length_is_refused_before_anything_is_allocated() -> None:
    limits = Limits(payload_bytes={MessageType.SEND_MODEL: 2**30, MessageType.TRAINING_LABELS: 10})
    fields = json.dumps({**FIELDS, "type": "TRAINING_LABELS", "checksum": ""}).encode()
    stream = pack_head(len(fields), 2**29, crc=crc32(fields)) + fields
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="at most 10 are"):
        decode(stream, [], limits)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("before", [[], [Message(MessageType.MESSAGE, content="hello")]])
@pytest.mark.parametrize("payload", [b"", b"weights"])
def test_a_flipped_bit_anywhere_in_a_frame_is_damage(payload: bytes, before: list[Message]) -> None:
    """Never another error, which would say that the peer is at fault; and never a message."""
    kind = MessageType.SEND_MODEL if payload else MessageType.TRAINING_DONE
    sent = frame(
        Message(kind, "client_0", "server", {"loss": 1.5}, Position("r", 1, 2, 0), payload)
    )
    start = b"".join(map(frame, before))
    for bit in range(8 * len(sent)):
        damaged = bytearray(sent)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged, match="arrived damaged"):
            decode(start + bytes(damaged), [])


@given(st.lists(messages(), min_size=1, max_size=3), st.data())
def test_a_flipped_bit_anywhere_in_a_stream_is_damage(
    sent: list[Message], data: st.DataObject
) -> None:
    stream = bytearray(b"".join(frame(message) for message in sent))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Damaged):
        decode(bytes(stream) + frame(Message(MessageType.MESSAGE)) * 2, [])


def test_a_damaged_length_is_not_waited_for() -> None:
    """Damage is found when the head is there, not when as many bytes have come as it says."""
    stream = bytearray(frame(Message(MessageType.MESSAGE, content="x" * 300)))
    stream[10] ^= 1  # 256 bytes more
    with pytest.raises(Damaged):
        decode(bytes(stream[: HEAD.size]), [])


def test_who_has_spoken_well_is_damaged_and_no_stranger() -> None:
    stream = frame(Message(MessageType.MESSAGE)) + b"GET / HTTP/1.1\r\nHost: example.org\r\n"
    with pytest.raises(Damaged):
        decode(stream, [])


def test_another_version_is_known_by_its_head_and_answered_in_it() -> None:
    asked = encode_head(Message(MessageType.REGISTER, content={"client_id": 0}), version=1)
    with pytest.raises(OtherVersion, match=r"it runs SFL 0\.1 \(protocol 1\)") as found:
        decode(asked, [])
    assert found.value.version == 1
    assert f"install SFL {sfl.__version__} on your machine" in found.value.answer
    answer = encode_head(Message(MessageType.INVALID_MESSAGE, content="why"), version=1)
    magic, version, flags, reserved, json_bytes, payload_bytes = struct.unpack_from(
        ">4sBBHIQ", answer
    )
    assert (magic, version, flags, reserved, payload_bytes) == (b"SFL\n", 1, 0, 0, 0)
    assert len(answer) == 20 + json_bytes
    assert json.loads(answer[20:])["content"] == "why"


def test_the_version_that_we_speak_is_the_release_s() -> None:
    assert sfl.__version__.startswith(f"{RELEASES[VERSION]}.")


def test_nan_and_infinity_pass_as_values() -> None:
    sent = Message(MessageType.MESSAGE, content={"loss": float("inf")})
    assert decode(frame(sent), []) == [sent]


def test_a_field_of_the_content_is_checked() -> None:
    message = Message(MessageType.MESSAGE, content={"count": 3, "flag": True})
    assert message.get("count", int) == 3
    assert message.get("count", float) == 3.0
    for name, kind in (("flag", int), ("nothing", str), ("count", str)):
        with pytest.raises(ProtocolError, match=name):
            message.get(name, kind)


def test_every_message_type_is_sent_and_expected_somewhere() -> None:
    package = Path(sfl.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.py") if path.name != "messages.py"]
    uses = re.findall(r"MessageType\.([A-Z_]+)", "".join(sources))
    assert [t.name for t in MessageType if uses.count(t.name) < 2] == []
