"""What the tests of the page stand on: a browser and node, and that they see what is wrong."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.server import serve

from tests.support.chromium import Chromium, needs_chromium
from tests.support.javascript import call, needs_node, run_module
from tests.support.tab import JavaScriptError

PAGE = """<!doctype html><meta name=viewport content="width=device-width">
<style>@media (prefers-color-scheme: dark) { body { background: black } }</style>
<canvas width=100 height=100></canvas><button>press</button><input type=file multiple>
<script>
window.seen = [];
for (const name of ["pointerdown", "pointermove", "pointerup"])
  document.querySelector("canvas").addEventListener(name, (e) =>
    seen.push([e.pointerType, name, Math.round(e.offsetX), Math.round(e.offsetY)]));
document.querySelector("canvas").style.touchAction = "none";
document.querySelector("button").onclick = () => seen.push("click");
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A page on this machine."""
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "worker.js").write_text("fetch('/of_a_worker'); postMessage(1)")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@needs_chromium
def test_a_page_is_used_and_watched(chromium: Chromium, address: str, tmp_path: Path) -> None:
    tab = chromium.open(f"http://{address}/", dark=True)
    for kind in ("mouse", "pen", "touch"):
        tab.draw("canvas", [(0.1, 0.2), (0.5, 0.5)], kind)
        seen = tab.wait_for("seen.length >= 3 && seen.splice(0)")
        names = ["pointerdown", "pointermove", "pointerup"]
        assert [row[:2] for row in seen] == [[kind, name] for name in names]
        assert seen[0][2:] == [10, 20]
        assert seen[1][2:] == [50, 50]
    tab.press("Tab")
    tab.press(" ")
    assert tab.wait_for("seen") == ["click"]
    tab.choose("input", tmp_path / "index.html", tmp_path / "worker.js")
    assert tab.evaluate("[...document.querySelector('input').files].map(f => f.name)") == [
        "index.html",
        "worker.js",
    ]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(0, 0, 0)"
    tab.set_dark(False)
    tab.set_window(390, 800, scale=2, mobile=True)
    assert tab.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [
        390,
        False,
    ]
    assert tab.screenshot(tmp_path / "page.png").stat().st_size > 1000
    with pytest.raises(JavaScriptError, match="nothing here"):
        tab.evaluate("Promise.reject(new Error('nothing here'))")
    with pytest.raises(AssertionError, match="it is false"):
        tab.wait_for("false", 0.2)
    assert tab.hosts == {address}
    tab.errors.clear()  # there is no favicon
    tab.close()


@needs_chromium
def test_what_a_page_must_not_do_is_seen(chromium: Chromium, address: str) -> None:
    tab = chromium.open(f"http://{address}/")
    tab.evaluate("fetch('https://elsewhere.example/x').catch(() => 0)")
    tab.evaluate("setTimeout(() => { throw new Error('thrown later') }); console.error('told', 7)")
    tab.evaluate("new Promise(r => { new Worker('worker.js').onmessage = r }).then(() => 1)")
    tab.wait_for("new Promise(r => setTimeout(() => r(1), 100))")
    assert tab.hosts == {address, "elsewhere.example"}
    assert f"http://{address}/of_a_worker" in tab.requests
    for words in ("thrown later", "told 7", "ERR_NAME_NOT_RESOLVED"):
        assert any(words in error for error in tab.errors), (words, tab.errors)
    with serve(lambda socket: socket.send(socket.recv()[::-1]), "127.0.0.1", 0) as echo:
        thread = threading.Thread(target=echo.serve_forever)
        thread.start()
        port = echo.socket.getsockname()[1]
        tab.evaluate(
            f"new Promise(r => {{ const s = new WebSocket('ws://127.0.0.1:{port}/a');"
            " s.onopen = () => s.send(new Uint8Array([0, 1, 255])); s.onmessage = () => r(1); })"
        )
        assert [frame[:2] for frame in tab.frames] == [
            (True, b"\x00\x01\xff"),
            (False, b"\xff\x01\x00"),
        ]
        tab.close()
        echo.shutdown()
        thread.join()


@needs_node
def test_a_module_answers(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "twice.js").write_text("export const twice = async (x) => x.map((y) => 2 * y);")
    assert call("twice.js", "twice", [1, 2.5], folder=tmp_path) == [2, 5]
    assert call("twice.js", "twice", b"\x01\x7f", folder=tmp_path) == b"\x02\xfe"
    text = "console.log('said'); answer({ floats: new Float32Array([0.5]), given: args[0] });"
    assert run_module(text, {"a": None}, folder=tmp_path) == {"floats": [0.5], "given": {"a": None}}
    with pytest.raises(AssertionError, match="no such thing"):
        run_module("throw new Error('no such thing')", folder=tmp_path)
