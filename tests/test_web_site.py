"""The site for browsers: what it serves and carries, whom it lets in, what it bounds."""

import contextlib
import gzip
import json
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("websockets")
pytest.importorskip("onnxruntime")
import onnxruntime
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import sfl
from experiments.hostile.memory import peak_bytes
from experiments.hostile.upgrades import FRAMES, first_part, piece, sent
from experiments.web import doors, pages
from sfl.transport.connection import Connection
from sfl.transport.websocket import opened
from sfl.wire.messages import Limits
from tests.support.requesters import Requester
from tests.support.served_site import Served, serving, silent
from tests.support.simulations import simulated

pytestmark = pytest.mark.slow  # each starts a server

MIB = 2**20
CLOSE = piece(struct.pack("!H", 1000), 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sfl.Run:
    out = tmp_path_factory.mktemp("run")
    run = sfl.open_run(simulated(out, model="lenet5", rounds=1))
    sfl.export(run, "torch", "front", out=out / "front.pt")
    return run


def out_of(run: sfl.Run) -> Path:
    return run.path.parent.parent


@pytest.fixture(scope="module")
def site(run: sfl.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("site"), run) as site:
        yield site


@pytest.fixture(scope="module")
def secure(run: sfl.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("secure"), run, tls=True) as site:
        yield site


def test_the_model_is_described_and_its_files_are_those_of_the_run(site: Served) -> None:
    about = json.loads(site.ask("/model.json").content)
    assert about["input_shape"] == [1, 28, 28]
    (features,) = about["features"]
    assert (features["link"], features["shape"], features["sent"]) == (0, [400], True)
    assert [s["file"] for s in about["segments"]] == ["model/front.onnx", ""]
    assert about["num_samples"] == 1000
    asked = site.ask("/sample?index=999")
    assert asked.headers["Cache-Control"] == "no-cache"  # the next site there may have another run
    sample = json.loads(asked.content)
    x = torch.tensor(sample["pixels"]).reshape(1, *sample["shape"]) / 255
    x = (x - about["mean"][0]) / about["std"][0]
    for name, module in (("front", site.run.front()), ("whole", site.run.model())):
        session = onnxruntime.InferenceSession(site.ask(f"/model/{name}.onnx").content)
        (outputs,) = session.run(None, {"input": x.numpy()})
        assert np.abs(outputs - module(x).detach().numpy()).max() < 1e-5
    assert sample["label"] == 9


def test_pages_are_packed_and_closed_to_others(site: Served, secure: Served) -> None:
    for served in (site, secure):
        page, packed = served.ask("/"), served.ask("/", Accept_Encoding="br, gzip")
        assert gzip.decompress(packed.content) == page.content
        assert page.content == (pages.HERE / "page/index.html").read_bytes()
        assert int(served.ask("/", method="HEAD").headers["Content-Length"]) == len(page.content)
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval';" in policy
        scheme = "wss" if served.is_tls else "ws"
        assert f"connect-src 'self' {scheme}://127.0.0.1:{served.port};" in policy
        for header, value in {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            assert page.headers[header] == value


def test_without_the_runtime_the_page_says_what_to_do(tmp_path: Path) -> None:
    found = pages.Pages({}, print)
    found_runtime, pages._RUNTIME = pages._RUNTIME, tmp_path
    try:
        missing = found.respond("/ort/ort.wasm.min.mjs", accepts_gzip=False)
        assert missing.status == 404
        assert b"npm ci --ignore-scripts" in missing.body
        assert found.respond("/", accepts_gzip=False).status == 200
    finally:
        pages._RUNTIME = found_runtime


@pytest.mark.parametrize(
    "path",
    [
        "/../__main__.py", "/..%2f__main__.py", "/page/../../README.md", "//etc/passwd",
        "/etc/passwd",
        "/ort/../package.json", "/ort/..", "/ort/ort.all.min.js", "/index.html/", "/.", "/%00.js",
        "/nothing.js?" + "a=1&" * 100, "/model/back.onnx", "/model/../front.onnx",
        "http://127.0.0.1/x.js",
    ],
)  # fmt: skip
def test_no_other_file_is_given(site: Served, path: str) -> None:
    response = site.ask(path)
    assert (response.status, response.content) == (404, b"there is no such page\n")


def test_what_is_wrong_is_said_in_one_line(site: Served) -> None:
    for path, why in {
        "/sample": "index='': give 0 to 999",
        "/sample?index=1000": "index='1000': give 0 to 999",
        "/sample?index=-1": "index='-1': give 0 to 999",
        "/sample?" + "a=1&" * 100: "Max number of fields exceeded",
    }.items():
        response = site.ask(path)
        assert (response.status, response.content.decode().count("\n")) == (400, 1)
        assert why in response.content.decode()
    assert site.ask("/", method="POST").status == 405


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("", "", 101),
        ("", "http://127.0.0.1:PORT", 101),
        ("localhost:9999", "http://localhost:9999", 101),  # the port is another one behind a tunnel
        ("", "https://example.org", 403),
        ("", "null", 403),
        ("", "http://127.0.0.1:1", 403),
        ("", "http://localhost:PORT", 403),
        ("", "http://[", 403),
        ("example.org", "http://example.org", 421),  # a name that was let point here
        ("10.0.0.2", "", 421),
        ("127.0.0.1@example.org", "", 421),
        ("localhost:x", "", 421),
        ("[::1", "", 421),
    ],
)
def test_pages_of_strangers_are_refused(site: Served, host: str, origin: str, status: int) -> None:
    own = [f"Origin: {origin.replace('PORT', str(site.port))}"] if origin else []
    said = site.answers(site.request("/predict", *own, host=host), [CLOSE])
    assert said.startswith("closed: 1000" if status == 101 else f"HTTP/1.1 {status}")


@pytest.mark.parametrize(
    ("path", "where", "how", "status"),
    [
        ("/", "cross-site", "navigate document", 200),
        ("/?from=a-link", "same-site", "navigate document", 200),
        ("/sample?index=0", "cross-site", "navigate document", 403),
        ("/sample?index=0", "cross-site", "no-cors image", 403),
        ("/sample?index=0", "same-site", "no-cors script", 403),  # of another port
        ("/", "cross-site", "navigate iframe", 403),
        ("/sample?index=0", "same-origin", "cors empty", 200),
        ("/sample?index=0", "none", "navigate document", 200),  # typed by the user
    ],
)
def test_pages_of_strangers_may_only_link_here(
    site: Served, path: str, where: str, how: str, status: int
) -> None:
    mode, dest = how.split()
    named = {"Sec_Fetch_Site": where, "Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": dest}
    assert site.ask(path, **named).status == status


def test_a_refusal_repeats_nothing_of_the_request(site: Served) -> None:
    refused = site.ask("/", Host="x;script-src *")
    assert refused.status == 421
    assert "script-src *" not in refused.headers["Content-Security-Policy"]


def test_which_hosts_are_ours() -> None:
    everywhere = doors.Doors("0.0.0.0", ["digits.example"], is_tls=False)
    assert [everywhere._is_ours(h) for h in ("digits.example:8080", "10.0.0.2", "x.example")] == [
        True, True, False
    ]  # fmt: skip
    assert [everywhere.is_isolated(h) for h in ("localhost:1", "10.0.0.2")] == [True, False]
    assert "Cross-Origin-Embedder-Policy" not in everywhere.headers("10.0.0.2")
    # A browser logs an error for an IPv6 address in a policy.
    assert "connect-src 'self';" in everywhere.headers("[::1]:80")["Content-Security-Policy"]


@contextlib.contextmanager
def requester(served: Served) -> Iterator[Requester]:
    """Ask for predictions over the site."""
    with served.target().connect() as stream:
        over = opened(stream, f"ws://127.0.0.1:{served.port}/predict")
        link = Connection(over, timeout_s=30, limits=Limits())
        yield Requester(link, out_of(served.run) / "front.pt", begins=True)


@pytest.mark.parametrize("name", ["site", "secure"])
def test_predictions_over_the_site_are_the_local_ones(
    name: str, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(name)
    whole = served.run.model()
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with requester(served) as asks, torch.no_grad():
        for size in (8, 1):
            assert torch.equal(asks.infer(x=x[:size]), whole(x[:size]))


def test_the_last_words_of_the_server_arrive(site: Served) -> None:
    with requester(site) as asks:
        asks.send(0)
        assert "a batch of 0 samples; served are 1 to 256 at once" in asks.refused()
    with requester(site) as asks:
        asks.send(4, torch.full((4, 400), float("nan")))
        assert "hold NaN, infinity or huge numbers" in asks.refused()


# What a frame that no page sends is answered with; the library's words behind the number.
CLOSED = {
    "a WebSocket's frame of 1 GB": "closed: 1009",
    "a WebSocket's frame of 2^63 bytes": "closed: 1009",
    "fragments for ever": "closed: 1009",
    "a compressed message": "closed: 1002",
    "a frame without a mask": "closed: 1002",
    "an unknown opcode": "closed: 1002",
    "a long ping": "closed: 1002",
    "a continuation of nothing": "closed: 1002",
    "text": "closed: 1007",  # a head is no UTF-8
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_strange_frame_ends_its_websocket_alone(site: Served, name: str) -> None:
    assert CLOSED[name] in site.answers(site.request(), first_part(name, FRAMES[name]))


def test_text_is_refused_with_a_reason(site: Served) -> None:
    with connect(f"ws://127.0.0.1:{site.port}/predict") as socket:
        socket.send("hello")
        with pytest.raises(ConnectionClosed, match=r"1003 .*text; SFL sends binary messages"):
            socket.recv(timeout=10)


@pytest.mark.parametrize("name", ["site", "secure"])
def test_who_floods_takes_little_and_hinders_nobody(
    name: str, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(name)
    served.ask("/model/front.onnx")
    before = peak_bytes(served.program.process.pid)
    half = b"" if served.is_tls else b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"x" * 8000
    with contextlib.ExitStack() as stack:
        for sock in silent(served, 2 * doors.MOST_SOCKETS, half):
            stack.enter_context(sock)
        for _ in range(50):  # each with a message that does not end
            stream = stack.enter_context(served.target().connect())
            sent(stream, [served.request(), piece(bytes(MIB), flags=0)[: MIB - 100]])
        with ThreadPoolExecutor(8) as pool:
            asked = pool.map(lambda _: served.ask("/model/front.onnx").status, range(40))
        assert set(asked) == {200}
        with requester(served) as asks:
            assert len(asks.infer(4)) == 4
    grown = peak_bytes(served.program.process.pid) - before
    assert grown < 300 * MIB, f"grew by {grown / MIB:.0f} MiB"


def test_too_many_websockets_are_refused(site: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(doors.MOST_WEBSOCKETS):
            stream = stack.enter_context(site.target().connect())
            sent(stream, [site.request()])
            stream.receive_into(memoryview(bytearray(2**16)))
        assert "503" in site.answers(site.request())
        assert site.ask("/").status == 200
    until = time.monotonic() + 20
    while "503" in site.answers(site.request(), [CLOSE]):  # until it has seen that they left
        assert time.monotonic() < until
