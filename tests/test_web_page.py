"""The page in a real browser: what it predicts, what it sends, and how it looks."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime")

from sfl.config import RunConfig
from sfl.data.samples import Samples
from sfl.interactive.run import Run, open_run
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from sfl.trained.inputs import expected_of
from tests.support.certificates import Certificates
from tests.support.chromium import Chromium, needs_chromium
from tests.support.javascript import needs_runtime
from tests.support.made_data import write_ham10000
from tests.support.sent_bytes import check_nothing_else, messages_in, rows_found
from tests.support.simulations import simulated
from tests.support.tab import Tab, eventually
from tests.support.websites import Website

pytestmark = [needs_chromium, needs_runtime, pytest.mark.slow]
SEVEN = [(0.28, 0.25), (0.5, 0.24), (0.72, 0.25), (0.6, 0.5), (0.47, 0.85)]
ONE = [(0.5, 0.15), (0.5, 0.5), (0.49, 0.85)]
SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
    "--enable-features=Vulkan",
)
NOTE = "document.querySelector('#backend-note')"
NONE = "\N{EN DASH}"
READY = "sfl.page.isReady && document.querySelector('#connection').dataset.state === 'connected'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Chromium]:
    with Chromium(folder, "--ignore-certificate-errors", *SOFTWARE_WEBGPU, gpu=True) as browser:
        yield browser


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return simulated(folder, dataset="mnist-5k", model="lenet5", clients=2, rounds=1)


@pytest.fixture(scope="module")
def site(trained: Path) -> Iterator[Website]:
    with Website(trained) as site:
        yield site


@contextlib.contextmanager
def visited(browser: Chromium, site: Website, **options: object) -> Iterator[Tab]:
    """Open the page, wait until it can predict, and see that it stays clean."""
    tab = browser.open(site.url, **options)  # type: ignore[arg-type]
    tab.wait_for(READY)
    yield tab
    assert tab.errors == []
    assert tab.hosts == {site.host}
    tab.close()


def predicted(tab: Tab, mode: str = "both") -> dict[str, object]:
    """Return what the page predicted last, once nothing is left to do."""
    tab.click(f"input[value={mode}]")
    page = "sfl.page.done === sfl.page.version && !sfl.page.isBusy && sfl.page.last"
    tab.wait_for(f"{page}.mode === '{mode}'")
    found = tab.evaluate(
        "(({local, far, name, difference}) => ({name, difference,"
        " local: local && [...local.outputs], far: far && [...far.outputs]}))(sfl.page.last)"
    )
    found["pixels"] = tab.evaluate("[...sfl.page.input.pad.pixels()]")
    return found


def outputs_of(run: Run, pixels: list[int]) -> np.ndarray:
    """Return what Python predicts for a canvas: (classes,) float32."""
    expected = expected_of(run)
    image = torch.tensor(pixels, dtype=torch.uint8).reshape(1, *expected.spec.input_shape)
    x, _ = expected.normalised(Samples(image, torch.zeros(1, dtype=torch.int64)))
    with torch.no_grad():
        return run.model().eval()(x)[0].numpy()


def check_agrees(run: Run, found: dict[str, object]) -> None:
    """Check that the page's predictions, here and with the server, are Python's."""
    wanted = outputs_of(run, found["pixels"])
    for way in ("local", "far"):
        outputs = np.array(found[way])
        assert np.abs(outputs - wanted).max() < 1e-4
        assert outputs.argmax() == wanted.argmax()
    assert found["name"] == expected_of(run).spec.classes[wanted.argmax()]
    assert found["difference"] < 1e-4


def sent_by(tab: Tab) -> bytes:
    return b"".join(frame.data for frame in tab.frames if frame.sent)


def test_a_drawing_is_predicted_as_python_does(
    browser: Chromium, site: Website, trained: Path, tmp_path: Path
) -> None:
    _, cert, _, key = Certificates(tmp_path).issue("site")
    with Website(trained, tls_cert=str(cert), tls_key=str(key)) as safe:
        for where, kind in ((site, "mouse"), (safe, "pen")):
            with visited(browser, where) as tab:
                tab.draw("#pad", SEVEN, kind)
                found = predicted(tab)
                assert sum(pixel > 0 for pixel in found["pixels"]) > 40
                check_agrees(where.run, found)
                assert tab.text("#class") == found["name"]
                assert "the same class" in tab.text("#compared")


def test_only_the_cut_tensor_leaves_the_machine(browser: Chromium, site: Website) -> None:
    run = site.run
    with visited(browser, site) as tab:
        tab.draw("#pad", SEVEN)
        found = predicted(tab, "split")
        tensor = np.array(tab.evaluate("[...sfl.page.last.far.features[0].data]"), np.float32)
        assert tensor.shape == (400,)
        eventually(lambda: tensor.tobytes() in sent_by(tab))
        assert tab.text("#wire-bytes") == "1.6 kB"
        assert tab.text("#maps-note").startswith("16 maps of 5 \N{MULTIPLICATION SIGN} 5, 1.6 kB")
        assert tab.evaluate("document.querySelectorAll('#maps canvas').length") == 16
        batches = sent_by(tab).count(b"INFERENCE_BATCH")
        predicted(tab, "whole")
        tab.draw("#pad", ONE)
        found = predicted(tab, "whole")
        assert tab.text("#bytes-up") == "0 B"
        for place in ("#wire-bytes", "#ms-way", "#ms-back"):
            assert tab.text(place) == NONE
        assert "nothing is sent" in tab.text("#lead")
        leaks = {
            "bytes": "sfl.page.input.pad.pixels()",
            "floats": "sfl.page.input.values()",
            "doubles": "Float64Array.from(sfl.page.input.pad.pixels(), (p) => p / 255)",
        }
        sends = "".join(
            f"socket.send({value});" for value in ("new Uint8Array(9).fill(77)", *leaks.values())
        )
        tab.evaluate(f"{{const {{socket}} = sfl.page.server.inference.connection; {sends}}}")
        mark = bytes([77] * 9)  # all that was sent before has been seen when this is
        eventually(lambda: len(sent_by(tab).partition(mark)[2]) > 784 * (1 + 4 + 8))
        honest, _, leaked = sent_by(tab).partition(mark)
        assert honest.count(b"INFERENCE_BATCH") == batches
        check_nothing_else(messages_in(honest), run)
        assert rows_found(honest, run, found["pixels"]) == set()
        assert rows_found(leaked, run, found["pixels"]) == set(leaks)


def test_the_server_may_go_and_come_back(browser: Chromium, trained: Path) -> None:
    with Website(trained) as site:
        tab = browser.open(site.url)
        tab.wait_for(READY)
        tab.draw("#pad", ONE)
        site.stop()
        line = "document.querySelector('#connection').innerText"
        shown = tab.wait_for(f"{line}.startsWith('no answer') && {line}")
        assert re.match(r"no answer, trying again in \d+ s \(.*\)$", shown)
        tab.click("#clear")
        tab.draw("#pad", SEVEN)
        tab.wait_for(f"document.querySelector('#class').innerText === '{NONE}'")
        tab.wait_for("document.querySelector('#status').innerText.includes('does not answer')")
        check = predicted(tab, "whole")  # still works
        assert check["name"] == tab.text("#class")
        site.start()
        tab.wait_for(READY)
        check_agrees(site.run, predicted(tab))
        assert all("ERR_CONNECTION_REFUSED" in e or "WebSocket" in e for e in tab.errors), (
            tab.errors
        )
        for name, state in (("pagehide", "off"), ("pageshow", "connected")):  # as Back does
            tab.evaluate(f"dispatchEvent(new PageTransitionEvent('{name}', {{persisted: true}}))")
            tab.wait_for(f"document.querySelector('#connection').dataset.state === '{state}'")
        tab.evaluate("document.querySelector('#address').value = 'ws://example.org/predict'")
        tab.click("#server button")
        tab.wait_for("document.querySelector('#connection').dataset.state === 'refused'")
        assert "may connect only to where it comes from" in tab.text("#status")
        assert tab.hosts == {site.host}
        tab.close()


def test_a_phone_and_the_dark(browser: Chromium, site: Website) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with visited(browser, site, size=(360, 800)) as tab:
        tab.set_window(360, 800, mobile=True)
        tab.draw("#pad", SEVEN, "touch")
        check_agrees(site.run, predicted(tab))
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        wide = (
            "[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right)"
        )
        assert max(tab.evaluate(wide)) <= 360
        light = tab.evaluate(background)
        tab.set_dark(True)
        tab.wait_for(f"{background} !== '{light}'")
        levels = [int(level) for level in re.findall(r"\d+", tab.evaluate(background))]
        assert max(levels) < 50
        tab.click("#theme")
        tab.wait_for(f"{background} === '{light}'")


def test_keys_samples_and_pictures(browser: Chromium, site: Website, tmp_path: Path) -> None:
    count = "sfl.page.input.pad.pixels().filter((p) => p > 0).length"
    with visited(browser, site) as tab:
        tab.evaluate("document.querySelector('#pad').focus()")
        for key in (" ", "ArrowDown", "ArrowDown", "ArrowRight"):
            tab.press(key)
        assert tab.evaluate(count) > 10
        check_agrees(site.run, predicted(tab))
        tab.click("#undo")
        assert tab.evaluate(count) == 0
        assert tab.text("#class") == NONE
        tab.evaluate("void sfl.context.onFeatures((seen) => (window.told ??= []).push(seen))")
        tab.evaluate("sfl.page.input.takeSample(4); sfl.page.input.takeSample(5)")
        found = predicted(tab)
        assert tab.evaluate("told.length") <= 2  # of the mode before and of this one
        assert tab.evaluate(
            "told.every((seen) => seen.pixels.join() === [...sfl.page.input.values()].join())"
        )
        sample = site.files.test_set.take(torch.tensor([5]))
        assert found["pixels"] == sample.x.flatten().tolist()
        check_agrees(site.run, found)
        assert tab.text("#truth") == f"test sample 5: it is {int(sample.y)}"
        Image.new("LA", (10, 40), (200, 0)).save(tmp_path / "clear.png")
        tab.choose("#file", tmp_path / "clear.png")
        tab.wait_for(f"{count} > 0 && !document.querySelector('#truth').checkVisibility()")
        found = predicted(tab)
        image = np.array(found["pixels"]).reshape(28, 28)
        assert image[:, 11:17].min() == 255  # transparent pixels are white, as Python has it
        assert image[:, :10].max() == image[:, 18:].max() == 0
        (tmp_path / "bad.png").write_bytes(b"no picture")
        tab.choose("#file", tmp_path / "bad.png")
        tab.wait_for(
            "document.querySelector('#status').innerText.startsWith('bad.png is no picture')"
        )


def use(tab: Tab, backend: str) -> str:
    """Choose a backend; return what the page says of the one in use."""
    tab.click(f"input[value={backend}]")
    tab.wait_for(f"sfl.page.isReady && {NOTE}.innerText.startsWith('In use')")
    return tab.text("#backend-note")


def test_each_backend_takes_effect(browser: Chromium, site: Website) -> None:
    with visited(browser, site) as tab:
        tab.draw("#pad", SEVEN)
        if tab.evaluate("navigator.hardwareConcurrency") < 2:
            pytest.skip("one processor: no threads")
        assert re.fullmatch(r"In use: wasm with \d threads\.", use(tab, "threads"))
        assert tab.evaluate("sfl.context.ort.env.wasm.numThreads") > 1
        check_agrees(site.run, predicted(tab))
        said = use(tab, "webgpu")  # computes some convolutions wrongly on a software adapter
        is_used = tab.evaluate("sfl.page.runtime.backend") == "webgpu"
        assert is_used or re.search("since WebGPU (computes this model wrongly|finds no)", said)
        check_agrees(site.run, predicted(tab))
        use(tab, "wasm")
        assert tab.evaluate("sfl.context.ort.env.wasm.numThreads") == 1
        tab.evaluate("void Object.defineProperty(navigator, 'gpu', {value: undefined})")
        assert "since this browser offers no WebGPU" in use(tab, "webgpu")
        assert tab.evaluate("sfl.page.runtime.backend") == "wasm"
        check_agrees(site.run, predicted(tab))


# Makes WebGPU's outputs wrong by a hundredth of the largest.
WRONG = """import("/ort/ort.webgpu.min.mjs?threads=1").then(({ InferenceSession: sessions }) => {
  const create = sessions.create.bind(sessions);
  sessions.create = async (...given) => {
    const session = await create(...given);
    const run = session.run.bind(session);
    session.run = async (feeds) => {
      const outputs = await run(feeds);
      for (const { data } of Object.values(outputs)) data[0] += 0.01 * Math.max(...data);
      return outputs;
    };
    return session;
  };
})"""


def test_a_u_shaped_model_gives_the_server_no_outputs(browser: Chromium, folder: Path) -> None:
    run = simulated(
        folder, dataset="mnist-5k", model="mlp", topology="u-shaped", cut="3,5", rounds=1, run="u"
    )
    with Website(run) as site, visited(browser, site) as tab:
        tab.draw("#pad", SEVEN)
        check_agrees(site.run, predicted(tab))
        received = b"".join(frame.data for frame in tab.frames if not frame.sent)
        assert b"INFERENCE_FEATURES" in received
        assert b"INFERENCE_OUTPUTS" not in received
        assert len(tab.evaluate("sfl.page.last.far.features")) == 1
        assert tab.evaluate("sfl.page.last.far.times.back") > 0  # ms, as the server tells
        if "finds no" in use(tab, "webgpu"):
            return  # no software adapter in this browser
        assert tab.evaluate("sfl.page.runtime.backend") == "webgpu"  # multiplies matrices well
        check_agrees(site.run, predicted(tab))
        use(tab, "wasm")
        tab.evaluate(WRONG)
        assert "since WebGPU computes this model wrongly" in use(tab, "webgpu")


def test_a_picture_in_colour(browser: Chromium, folder: Path, tmp_path: Path) -> None:
    write_ham10000(tmp_path)
    config = RunConfig(
        dataset="ham10000", image_size=32, model="cnn-cifar10", rounds=1, run="h", clients=2
    )
    places = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    run = simulate(config, NodeConfig(out=str(folder), **places))
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    with Website(run, **places) as site, visited(browser, site) as tab:
        tab.choose("#file", tmp_path / "picture.png")
        tab.wait_for("!sfl.page.input.isEmpty")
        found = predicted(tab)
        assert found["pixels"] == picture.transpose(2, 0, 1).flatten().tolist()
        check_agrees(site.run, found)
        assert tab.text("#class") in open_run(run).normalisation.classes
