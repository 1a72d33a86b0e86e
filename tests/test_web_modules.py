"""The page's own protocol code: frames and torch files, against SFL's."""

import contextlib
import io
import json
import math
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

import sfl
from experiments.web.templates import parse_spec, state_template, template, tensor_template
from sfl.conversation.inference import described
from sfl.errors import ConfigError, RunError, reason_of
from sfl.files.torch_file import TensorSpec, encode, encode_state, max_file_bytes, state_spec
from sfl.trained.export import back_checksum
from sfl.values import Position
from sfl.wire.framing import Decoder, encode_head
from sfl.wire.messages import Limits, Message, MessageType
from tests.support.javascript import needs_node, run_module
from tests.support.launch import Launcher, wait_for
from tests.support.simulations import simulated

MESSAGES = [
    Message(MessageType.HEARTBEAT, "server", "page"),
    Message(
        MessageType.TRAINING_DONE, content={"loss": math.nan, "sum": -math.inf, "x": [0.1, None]}
    ),
    Message(
        MessageType.MESSAGE,
        content='waiting for "NaN", Infinity \\" and grün 𝄞',
        at=Position("r", 3),
    ),
    Message(
        MessageType.TRAINING_GRADS,
        "server",
        "client_1",
        {"loss": 2.5},
        Position("r", 1, 2, 1, 0),
        bytes(range(256)) * 40,
    ),
]


def frame(message: Message) -> bytes:
    return encode_head(message) + bytes(message.payload)


def decoded(data: bytes) -> Message:
    decoder = Decoder(Limits(payload_bytes=dict.fromkeys(MessageType, 10**6)))
    return next(decoder.messages_of(data))


FRAMES = """
import { Decoder, encode } from "./frames.js";
const [stream, frame, strange] = args;
const limits = { TRAINING_GRADS: 20000 };
const found = {};
for (const size of [1, 7, 100, 1e6]) {
  const decoder = new Decoder(limits);
  found[size] = [];
  for (let at = 0; at < stream.length; at += size) {
    decoder.feed(stream.slice(at, at + size));
    for (let one = decoder.next(); one; one = decoder.next()) {
      found[size].push(encode(one));
    }
  }
}
const caught = (limits, frame) => {
  const decoder = new Decoder(limits);
  decoder.feed(frame);
  try {
    return decoder.next() === null ? "waits" : "whole";
  } catch (error) {
    return error.message;
  }
};
const damaged = Array.from(frame, (byte, at) => {
  const copy = frame.slice();
  copy[at] = byte ^ 4;
  return caught(limits, copy);
});
const tooLarge = caught({ TRAINING_GRADS: 9 }, frame);
const refused = strange.map((one) => caught(limits, one));
answer({ found, damaged, tooLarge, refused, fine: caught(limits, frame) });
"""


def strange_frames() -> dict[str, bytes]:
    """Return frames with right checksums that the protocol forbids, by what the page says."""
    plain, json_bytes = frame(Message(MessageType.MESSAGE))[:20], frame(MESSAGES[0])[28:]
    deep = json_bytes.replace(b'"content":""', b'"content":' + b"[" * 16 + b"]" * 16)
    twice = json_bytes[:-1] + b',"ro\\u0075nd":1}'
    found = {
        "flags": (plain[:5] + b"\x80" + plain[6:], json_bytes),
        "that this page does not know": (plain[:6] + b"\0\x09" + plain[8:], json_bytes),
        "names a field twice": (plain, twice),
        "nested more than 16 deep": (plain, deep),
    }
    return {why: _with_checksums(head, text) for why, (head, text) in found.items()}


def _with_checksums(head: bytes, text: bytes) -> bytes:
    head = head[:8] + struct.pack(">I", len(text)) + head[12:20]
    head += struct.pack(">I", zlib.crc32(text))
    return head + struct.pack(">I", zlib.crc32(head)) + text


@needs_node
def test_frames_pass_both_ways_and_damage_is_found() -> None:
    stream = b"".join(map(frame, MESSAGES))
    small = Message(MessageType.TRAINING_GRADS, content="x", payload=b"0123456789")
    strange = strange_frames()
    result = run_module(FRAMES, stream, frame(small), list(strange.values()))
    for again in result["found"].values():
        assert len(again) == len(MESSAGES)
        for sent, data in zip(MESSAGES, again, strict=True):
            got = decoded(data)
            assert (got.type, got.at, bytes(got.payload)) == (sent.type, sent.at, sent.payload)
            if "loss" in sent.content and sent.type is MessageType.TRAINING_DONE:
                continue  # JavaScript writes no NaN: the page sends none
            assert got.content == sent.content
    assert result["fine"] == "whole"
    assert result["damaged"].count("whole") == 0
    assert "at most 9 are accepted" in result["tooLarge"]
    for why, said in zip(strange, result["refused"], strict=True):
        assert why in said


TORCH = """
import { fill, read } from "./torchfile.js";
const kinds = {
  float32: Float32Array, float64: Float64Array, int64: BigInt64Array, uint8: Uint8Array,
};
const message = (act) => {
  try {
    act();
    return "";
  } catch (error) {
    return error.message;
  }
};
answer(args[0].map(({ template, data, file, other }) => {
  const numbers = (one, index) => new kinds[template.tensors[index].dtype](one.slice().buffer);
  const tensors = data.map(numbers);
  const damaged = file.slice();
  damaged[Buffer.from(file).indexOf(data.at(-1))] ^= 1;
  return {
    file: fill(template, tensors),
    back: read(template, file).map((one) => new Uint8Array(one.buffer)),
    other: message(() => read(template, other)),
    damaged: message(() => read(template, damaged)),
    cut: message(() => read(template, file.slice(0, -30))),
    short: message(() => fill(template, tensors.map((one) => one.subarray(1)))),
  };
}));
"""


@needs_node
def test_torch_files_are_written_as_torch_does_and_read_back() -> None:
    torch.manual_seed(0)
    odd = torch.randn(32, 128)
    odd[3, 4], odd[5, 6], odd[0, 0] = math.nan, -math.inf, -0.0
    odd.view(torch.int32)[9, 9] = -4194303  # a NaN with a payload
    state = {"conv1.weight": torch.randn(6, 1, 5, 5), "conv1.bias": torch.randn(6)}
    state |= {f"fc{i}.bias": torch.randn(i) for i in range(1, 13)}
    contents: list[Any] = [
        odd,
        torch.arange(7),
        torch.randn(1, 16, 5, 5),
        torch.tensor([2.5], dtype=torch.float64),
        state,
    ]
    cases = []
    for content in contents:
        is_state = isinstance(content, dict)
        tensors = list(content.values()) if is_state else [content]
        other = (
            odd[:, :127].contiguous() if not is_state else {"conv2.weight": state["conv1.weight"]}
        )
        made = (
            state_template(state_spec(content))
            if is_state
            else tensor_template(TensorSpec.of(content))
        )
        cases.append(
            {
                "template": json.loads(json.dumps(made)),
                "data": [(t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tensors],
                "file": (encode_state(content) if is_state else encode(content)),
                "other": (encode_state(other) if is_state else encode(other)),
            }
        )
    for case, content, result in zip(cases, contents, run_module(TORCH, cases), strict=True):
        stream = io.BytesIO()
        torch.save(content, stream)
        assert result["file"] == stream.getvalue()
        assert result["back"] == case["data"]
        assert "holds other tensors than" in result["other"]
        assert "is damaged" in result["damaged"]
        assert result["cut"]
        assert "bytes of" in result["short"]


def test_files_of_another_layout_have_no_template() -> None:
    specs = {"": TensorSpec((2,), torch.float32)}
    file = encode(torch.zeros(2))
    assert template(specs, file)
    with zipfile.ZipFile(io.BytesIO(file)) as container:
        contents = {name: container.read(name) for name in container.namelist()}
    plain = io.BytesIO()  # without CRCs behind the contents
    with zipfile.ZipFile(plain, "w") as container:
        for name, content in contents.items():
            container.writestr(name, content)
    known = contents["archive/.data/serialization_id"]
    changed = known[:-1] + bytes([known[-1] ^ 1])  # of another hash, with its own CRC
    crcs = [zlib.crc32(digits).to_bytes(4, "little") for digits in (known, changed)]
    other = file.replace(known, changed).replace(*crcs)
    for strange in (plain.getvalue(), other, file[:-30]):
        with pytest.raises(RunError, match="in a layout that pages do not know"):
            template(specs, strange)
    with pytest.raises(RunError, match="in a layout that pages do not know"):
        template({"": TensorSpec((3,), torch.float32)}, file)


def test_errors_of_the_exporter_have_no_colours() -> None:
    error = ValueError("Failed. \x1b[96mThis is step 1/3\x1b[0m of exporting\nmore")
    assert reason_of(error) == "ValueError: Failed. This is step 1/3 of exporting"


@pytest.mark.parametrize("shape", ["", "0", "1,-2", "1,x", "9" * 9 + ",9", ",".join("1" * 9), "٣"])
def test_templates_of_bounded_size_alone(shape: str) -> None:
    with pytest.raises(ConfigError, match="/template"):
        parse_spec("float32", shape)


INFERENCE = """
import { Inference } from "./inference.js";
import { Templates } from "./torchfile.js";
const [url, model, templates, batches] = args;
const fetcher = async ({ search }) => ({ ok: true, json: async () => templates[search] });
const given = new Templates("http://127.0.0.1/", fetcher);
const message = (error) => error.message;
const other = { ...model, hello: { ...model.hello, cut: "1" } };
const refused = await Inference.open(url, other, given).catch(message);
const newer = await Inference.open(url, { ...model, back_checksum: "0" }, given).catch(message);
const inference = await Inference.open(url, model, given);
const all = batches.map((z) => inference.infer(Float32Array.from(z.flat()), z.length));
const replies = await Promise.all(all);
const nan = await inference.infer(new Float32Array(batches[0].flat().length).fill(NaN), 1)
  .catch(message);
inference.close();
const away = await Inference.open("ws://127.0.0.1:1/", model, given).catch(message);
answer({ refused, newer, replies, nan, away });
"""


@needs_node
def test_split_inference_from_javascript(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_OPTIONS", "--experimental-websocket")
    run = sfl.open_run(simulated(tmp_path / "own", model="mlp", clients=1, rounds=1))
    launcher.transport = "ws"
    wait_for(launcher.server("--serve", run.path), "listening")
    z = [torch.randn(size, 128, generator=torch.Generator().manual_seed(size)) for size in (1, 5)]
    model = {
        "hello": described(run.split),
        "features": [{"link": 0, "shape": [128]}],
        "back_checksum": back_checksum(run),
        "overhead_bytes": max_file_bytes([TensorSpec((0,), torch.float32)]),
        "sfl": "test",
    }
    shapes = [(size, width) for size in (1, 5) for width in (128, 10)]
    templates = {
        f"?dtype=float32&shape={a},{b}": tensor_template(TensorSpec((a, b), torch.float32))
        for a, b in shapes
    }
    url = f"ws://127.0.0.1:{launcher.port}/"
    found = run_module(INFERENCE, url, model, templates, [one.tolist() for one in z])
    with torch.no_grad():
        back = run.segment("back").eval()
        for one, reply in zip(z, found["replies"], strict=True):
            assert reply["link"] == -1
            assert torch.equal(torch.tensor(reply["data"]).reshape(-1, 10), back(one))
            assert 0 < reply["seconds"] < reply["totalMs"] / 1000
            assert reply["bytesSent"] > 512 * len(one) > reply["bytesReceived"] - 2000
    assert "the server refused this page: the front that you give has cut" in found["refused"]
    assert "load the page again" in found["newer"]
    assert "NaN or infinity" in found["nan"]
    assert "cannot be reached" in found["away"]


WORDS = """
import { Connection } from "./connection.js";
const [url] = args;
const told = (error) => ({ said: error.message, again: error.again });
const silent = await Connection.open(`${url}silent`, { timeoutS: 1 });
silent.heartbeatS = 0.2;
const found = { silent: await silent.receive(["GO_ON"]).catch(told) };
for (const type of ["TRY_AGAIN", "END_RUN", "INVALID_MESSAGE", "GO_ON"]) {
  const one = await Connection.open(`${url}${type}`);
  found[type] = await one.receive(["REGISTERED"]).catch(told);
}
for (const path of ["close/1013", "close/1003", "close/1000", "unknown"]) {
  const one = await Connection.open(`${url}${path}`);
  found[path] = await one.receive(["REGISTERED"]).catch(told);
}
const stops = new AbortController();
const stopped = await Connection.open(`${url}silent`, { signal: stops.signal });
stopped.farewell = "UNREGISTER";
stops.abort();
found.stopped = await stopped.receive(["GO_ON"]).catch(told);
answer(found);
"""


@needs_node
def test_silence_and_last_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_OPTIONS", "--experimental-websocket")
    came: list[MessageType] = []

    def handle(socket: ServerConnection) -> None:
        assert socket.request
        name = socket.request.path[1:]
        if name.startswith("close/"):
            return socket.close(int(name[6:]), "the site\nsays why")
        if name == "unknown":
            text = b'{"type":"constructor","run":"","round":-1,"step":-1,"client":-1,"link":0}'
            socket.send(_with_checksums(frame(MESSAGES[0])[:20], text))
        elif name != "silent":
            socket.send(frame(Message(MessageType(name), content="not\nnow")))
        with contextlib.suppress(ConnectionClosed):
            for data in socket:
                assert isinstance(data, bytes)
                came.append(decoded(data).type)

    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        found = run_module(WORDS, f"ws://127.0.0.1:{port}/")
        server.shutdown()
        thread.join()
    assert found["silent"] == {"said": "the server sent nothing for 1 seconds", "again": True}
    assert found["TRY_AGAIN"]["again"]
    assert found["END_RUN"] == {"said": "the server ended the run: not now", "again": False}
    assert found["INVALID_MESSAGE"]["said"] == "the server refused this page: not now"
    assert found["GO_ON"]["said"] == "the server sent GO_ON, expected was REGISTERED"
    assert found["stopped"]["said"] == "stopped in the page"
    assert found["close/1013"] == {"said": "the site says why", "again": True}
    assert found["close/1003"] == {"said": "the site says why", "again": False}
    assert found["close/1000"]["again"]
    assert found["unknown"]["said"] == "the server sent constructor, expected was REGISTERED"
    assert came.count(MessageType.HEARTBEAT) >= 3
    assert came[-2:] == [MessageType.INVALID_MESSAGE, MessageType.UNREGISTER]
