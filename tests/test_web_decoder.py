"""What an attacker sees: the decoder, its figure of similarity, and how the page shows both."""

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime")

from experiments.web.decoder import ImageDecoder, Made, make_decoder, observer, shadow_images, train
from experiments.web.decoder_cache import made_once
from experiments.web.decoder_process import FAILED, READY, TRAINING, DecoderProcess
from experiments.web.similarity import C1, C2, SIGMA, WINDOW, ssim
from sfl.errors import RunError
from sfl.interactive.run import Run, open_run
from sfl.nodes import NodeConfig
from sfl.trained.kinds import onnx_session
from tests.support.chromium import Chromium, needs_chromium
from tests.support.javascript import call, needs_node, needs_runtime
from tests.support.simulations import simulated
from tests.support.websites import Website

pytestmark = pytest.mark.slow  # each starts a server

STEPS = 50
MARGIN = 0.25  # of SSIM; after so few steps the decoder is 0.4 better than the mean image
THREE = [(0.3, 0.2), (0.5, 0.15), (0.68, 0.27), (0.45, 0.48), (0.68, 0.7), (0.5, 0.85), (0.3, 0.78)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("decoder")
    return open_run(simulated(out, dataset="mnist-5k", model="lenet5", clients=2, rounds=1))


@pytest.fixture(scope="module")
def images(run: Run) -> Tensor:
    return shadow_images(run, NodeConfig())[:500]


@pytest.fixture(scope="module")
def made(run: Run, images: Tensor) -> Made:
    return make_decoder(run, images, steps=STEPS)


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Return the similarity of two images of one channel, by loops over places and pixels."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    found = []
    for top in range(a.shape[0] - WINDOW + 1):
        for left in range(a.shape[1] - WINDOW + 1):
            x, y = (image[top : top + WINDOW, left : left + WINDOW] for image in (a, b))
            m, n = (weights * x).sum(), (weights * y).sum()
            v, w = (weights * (x - m) ** 2).sum(), (weights * (y - n) ** 2).sum()
            both = (weights * (x - m) * (y - n)).sum()
            above = (2 * m * n + C1) * (2 * both + C2)
            found.append(above / ((m * m + n * n + C1) * (v + w + C2)))
    return float(np.mean(found))


def test_similarity_is_that_of_the_paper(images: Tensor) -> None:
    first, second = images[:3], images[3:6]
    assert torch.equal(ssim(first, first), torch.ones(3, dtype=torch.float64))
    assert ssim(first, second) == pytest.approx(ssim(second, first))
    pairs = zip(first[:, 0].double().numpy(), second[:, 0].double().numpy(), strict=True)
    assert ssim(first, second).tolist() == pytest.approx([by_hand(a, b) for a, b in pairs])
    grey, dark = torch.full((1, 3, 12, 15), 0.5), torch.full((1, 3, 12, 15), 0.1)
    assert float(ssim(grey, dark)) == pytest.approx((2 * 0.05 + C1) / (0.25 + 0.01 + C1))


@needs_node
def test_the_pages_similarity_is_the_same(images: Tensor) -> None:
    drawn = torch.Generator().manual_seed(0)
    pairs = [(images[0], images[1]), (images[0], images[0] * 0.9)]
    for shape in ((3, 20, 13), (1, 8, 30), (1, 11, 5)):
        pairs.append(tuple(torch.rand(2, *shape, generator=drawn)))
    for a, b in pairs:
        there = call("similarity.js", "ssim", a.flatten(), b.flatten(), list(a.shape))
        assert there == pytest.approx(float(ssim(a[None], b[None])), abs=1e-6)


def test_a_decoder_sees_images_that_it_was_not_trained_on(
    run: Run, images: Tensor, made: Made
) -> None:
    assert made.similarity > made.baseline + MARGIN
    assert (made.num_shadow, made.num_held_out) == (400, 100)
    # The file computes what was measured.
    held_out, observe = images[:100], observer(run, None)
    session = onnx_session(made.data)
    (found,) = session.run(None, {"input": observe(held_out).numpy()})
    assert found.shape == held_out.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert float(ssim(torch.from_numpy(found), held_out).mean()) == pytest.approx(
        made.similarity, abs=1e-4
    )
    about = json.loads(session.get_modelmeta().custom_metadata_map["about"])
    assert (about["part"], about["takes"], about["run"]) == ("decoder", [400], "r")


def test_activations_of_other_images_tell_nothing(run: Run, images: Tensor, made: Made) -> None:
    held_out, shadow = images[:100], images[100:]
    observe = observer(run, None)
    shuffled = train(lambda batch: observe(batch.roll(1, 0)), shadow, STEPS)
    with torch.no_grad():
        found = float(ssim(shuffled(observe(held_out)), held_out).mean())
    assert found < made.baseline + MARGIN / 2


def test_a_decoder_depends_on_its_seed_alone(run: Run, images: Tensor) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        torch.rand(3)  # what was drawn before does not matter
        return train(observer(run, None), images, 3, seed=seed).state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("features", "image"),
    [((16, 5, 5), (1, 28, 28)), ((6, 14, 9), (3, 33, 47)), ((7,), (1, 5, 100)),
     ((64, 8, 8), (3, 8, 8)), ((25088,), (3, 224, 224))],
)  # fmt: skip
def test_activations_of_any_shape_are_taken(
    features: tuple[int, ...], image: tuple[int, ...]
) -> None:
    decoder = ImageDecoder(torch.rand(4, *features), image)
    assert decoder(torch.rand(2, *features)).shape == (2, *image)
    assert sum(p.numel() for p in decoder.parameters()) < 2**23
    assert math.isfinite(float(decoder(torch.zeros(2, *features)).detach().sum()))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodeConfig:
    return NodeConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def process(run: Run, node: NodeConfig) -> Iterator[DecoderProcess]:
    with DecoderProcess(run.path, node, steps=STEPS) as process:
        yield process


def ended(process: DecoderProcess) -> dict[str, object]:
    """Wait until it trains no more; return what it tells."""
    progress, end = process.routes()["/decoder.json"], time.monotonic() + 120
    while time.monotonic() < end:
        told: dict[str, object] = json.loads(progress({}).body)
        if told["state"] != TRAINING:
            return told
        time.sleep(0.1)
    raise AssertionError(told)


BLANK = """[...document.querySelectorAll("#attacker-pair canvas")].every((c) =>
  c.getContext("2d").getImageData(0, 0, c.width, c.height).data.every((level) => !level))"""


@needs_chromium
@needs_runtime
def test_the_page_shows_what_an_attacker_sees(
    run: Run, process: DecoderProcess, chromium: Chromium
) -> None:
    attacker = "document.querySelector('#attacker').attacker"
    with Website(run.path, process) as site:
        tab = chromium.open(site.url)
        tab.wait_for("sfl.page.isReady && !document.querySelector('#attacker').hidden")
        tab.draw("#pad", THREE)
        tab.wait_for("sfl.page.last")
        assert tab.evaluate(f"{attacker}.last") is None  # nothing is made while it is off
        assert not any("decoder" in url for url in tab.requests)
        tab.click("#attacker-on")
        first = tab.wait_for(f"{attacker}.last?.similarity", 120)
        made = np.array(tab.evaluate(f"[...{attacker}.last.pixels]"), np.float32)
        pixels = np.array(tab.evaluate(f"[...{attacker}.last.original]"), np.float32)
        sent = np.array(tab.evaluate(f"[...{attacker}.last.features]"), np.float32)
        assert any(sent.tobytes() in frame.data for frame in tab.frames if frame.sent)
        session = onnx_session(process.routes()["/decoder.onnx"]({}).body)
        (wanted,) = session.run(None, {"input": sent[None]})
        assert np.abs(made - wanted.ravel()).max() < 1e-4
        both = (torch.from_numpy(image).view(1, 1, 28, 28) for image in (pixels, made))
        assert first == pytest.approx(float(ssim(*both)), abs=1e-6)
        assert 0 < first <= 1
        assert tab.text("#attacker-similarity") == f"{first:.2f}"
        tab.draw("#pad", [(0.2, 0.5), (0.8, 0.5)], "pen")
        tab.wait_for(f"{attacker}.last.similarity !== {first!r}")
        tab.click("#clear")
        tab.wait_for(f"{attacker}.last === null")
        assert tab.text("#attacker-similarity") == "\N{EN DASH}"
        assert f"{ended(process)['similarity']:.2f} on average" in tab.text("#attacker-about")
        similarity = "document.querySelector('#attacker-similarity').innerText"
        tab.draw("#pad", THREE)
        tab.wait_for(f"{similarity} !== '\N{EN DASH}'")
        tab.click("input[value=whole]")
        tab.wait_for(f"{similarity} === '\N{EN DASH}'")
        assert tab.text("#attacker-note").startswith("Nothing is sent")
        assert tab.evaluate(BLANK)
        tab.click("input[value=split]")
        tab.wait_for(f"{similarity} !== '\N{EN DASH}'")
        tab.click("#clear")
        tab.wait_for(f"{similarity} === '\N{EN DASH}'")
        assert tab.evaluate(BLANK)
        assert (tab.errors, tab.hosts) == ([], {site.host})
        tab.close()


def test_a_process_makes_it_beside_the_site(process: DecoderProcess, made: Made) -> None:
    told = ended(process)
    assert told["state"] == READY
    assert told["done"] == told["of"] == STEPS
    assert told["num_held_out"] == 200
    assert told["similarity"] > told["baseline"] + MARGIN
    assert process.routes()["/decoder.onnx"]({}).body[:1] == made.data[:1]


def test_it_is_made_once(
    run: Run, process: DecoderProcess, node: NodeConfig, made: Made, tmp_path: Path
) -> None:
    ended(process)
    data = process.routes()["/decoder.onnx"]({}).body

    def kept(path: Path = node.cache_path, run: Run = run, steps: int = STEPS) -> bytes:
        return made_once(path, run, None, steps, lambda: made).data

    assert kept() == data != made.data
    assert kept(steps=STEPS + 1) == kept(tmp_path) == made.data
    (one,) = (tmp_path / "decoders").iterdir()
    for damaged in (one.read_bytes()[:-1], b"{}\n", b"[]", b"1", b"{", b""):
        one.write_bytes(damaged)
        assert kept(tmp_path) == made.data
    assert made_once(tmp_path, run, None, STEPS, pytest.fail) == made


def test_what_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DecoderProcess(tmp_path / "none", NodeConfig()) as process:
        with pytest.raises(RunError, match="the decoder is not ready"):
            process.routes()["/decoder.onnx"]({})
        told = ended(process)
        with pytest.raises(RunError, match=r"not ready: .*none"):
            process.routes()["/decoder.onnx"]({})
    assert told["state"] == FAILED
    assert str(tmp_path / "none") in told["note"]
    assert "Traceback" not in "".join(capsys.readouterr())


def test_a_site_that_ends_leaves_no_process(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = DecoderProcess(run.path, NodeConfig(cache_dir=str(tmp_path)))
    with process:
        (child,) = [p for p in multiprocessing.active_children() if p.name == "decoder"]
    assert child not in multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")
