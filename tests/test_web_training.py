"""Training in the page: its arithmetic against torch's, its conversation, and hostile pages."""

import base64
import contextlib
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("websockets")
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

import sfl
from experiments.web.training import TrainedRun, why_a_page_cannot
from sfl.cli import main_replay
from sfl.config import RunConfig
from sfl.data.client_data import batch_indices
from sfl.data.datasets import DATASETS
from sfl.data.private_data import load_own
from sfl.errors import ConfigError
from sfl.files.torch_file import decode, decode_state
from sfl.model.topology import Holder
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.framing import encode_head
from sfl.wire.messages import Message, MessageType
from tests.support.chromium import Chromium, needs_chromium
from tests.support.handshakes import TOKEN, token_file
from tests.support.javascript import needs_node, needs_runtime, run_module
from tests.support.launch import Launcher, Program, wait_for, was_killed
from tests.support.pages_that_train import HOSTILE, TRAIN, UNLUCKY, Own, run_pages
from tests.support.simulations import simulated
from tests.support.tab import Tab, eventually

OWN = RunConfig(partition="own", model="lenet5", batch_size=64, run="r", seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_the_step_as_a_graph_gives_the_gradients_of_torch(model: str) -> None:
    trained = TrainedRun.of(RunConfig(partition="own", model=model))
    assert trained.graphs.worst < 5e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"partition": "iid"}, "--partition 'iid'"),
        ({"model": "resnet18"}, "--model 'resnet18'"),
        ({"model": "os.path:join"}, "--model 'os.path:join'"),
        ({"dataset": "os.path:join"}, "--dataset 'os.path:join'"),
        ({"cut": 4}, "--cut 4"),
        ({"cut": "3,9"}, "--cut '3,9'"),
        ({"scheme": "fl"}, "--scheme fl"),
        ({"topology": "u-shaped", "cut": "3,9"}, "--topology 'u-shaped'"),
        ({"optimizer_state": "keep"}, "--optimizer-state 'keep'"),
        ({"freeze": "front"}, "--freeze 'front'"),
        ({"weights": "dir:/tmp"}, "--weights 'dir:/tmp'"),
        ({"augment": "hflip"}, "--augment hflip"),
        ({"dataset": "cifar10"}, "--augment hflip"),
        ({"image_size": 4096}, "too large for a page"),
        ({"batch_size": 2**20}, "--batch-size 1048576"),
    ],
)
def test_what_a_page_cannot_do_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    run = RunConfig(**{"partition": "own", **options})
    with pytest.raises(ConfigError, match=re.escape(named)):
        TrainedRun.of(run)


def test_only_what_comes_with_sfl_is_trained() -> None:
    assert not why_a_page_cannot(OWN)
    assert "same connection" in why_a_page_cannot(OWN, "fed.example:1")


OPTIMIZERS = """
import { Optimizer } from "./adam.js";
const [weights, grads, all] = args;
answer(all.map(({ lr, ...settings }) => {
  const own = [Float32Array.from(weights)];
  const optimizer = new Optimizer(own, settings, lr);
  for (const grad of grads) optimizer.step([Float32Array.from(grad)]);
  return own[0];
}));
"""


@needs_node
def test_optimisers_are_those_of_torch() -> None:
    drawn = torch.Generator().manual_seed(0)
    weights, grads = torch.randn(50, generator=drawn), torch.randn(20, 50, generator=drawn)
    plain = {"kind": "adam", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0}
    changes: list[dict[str, Any]] = [
        {}, {"weight_decay": 0.1}, {"clip_norm": 0.5}, {"kind": "sgd"}, {"proximal_mu": 0.3},
        {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    ]  # fmt: skip
    settings = [plain | {"proximal_mu": 0.0} | change for change in changes]
    found = run_module(OPTIMIZERS, weights, grads, settings)
    for wanted, got in zip(settings, found, strict=True):
        own = torch.nn.Parameter(weights.clone())
        some = {"lr": wanted["lr"], "weight_decay": wanted["weight_decay"]}
        made: torch.optim.Optimizer = (
            torch.optim.Adam([own], fused=True, **some)
            if wanted["kind"] == "adam"
            else torch.optim.SGD([own], momentum=wanted["momentum"], **some)
        )
        for grad in grads:
            own.grad = grad + wanted["proximal_mu"] * (own.detach() - weights)
            if wanted["clip_norm"]:
                torch.nn.utils.clip_grad_norm_([own], wanted["clip_norm"])
            made.step()
        assert (own.detach() - torch.tensor(got)).abs().max() < 1e-6, wanted


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for a site to serve."""
    return simulated(tmp_path_factory.mktemp("served"), model="mlp", clients=1, rounds=1)


@pytest.fixture
def site(launcher: Launcher, served: Path, tmp_path: Path) -> Iterator[str]:
    """A site in front of the launcher's server, with a token; return its address."""
    (tmp_path / "site").mkdir()
    own = Launcher(tmp_path / "site")
    secret = token_file(tmp_path, TOKEN)
    program = own.web(served, "--train", f"127.0.0.1:{launcher.port}", "--token-file", secret)
    wait_for(program, "in a browser")
    yield f"http://127.0.0.1:{own.port}/"
    assert "Traceback" not in program.out + program.err
    own.end()


def start(launcher: Launcher, tmp_path: Path, owns: list[Own], *options: object) -> Program:
    """Start a server, and client 0 in Python."""
    secret = ["--token-file", tmp_path / "token"]
    server = launcher.server(
        "--clients", len(owns), "--partition", "own", "--run", "r", "--seed", 3, *secret, *options,
    )  # fmt: skip
    wait_for(server, "listening")
    own = owns[0].write(tmp_path / "own_0")
    launcher.client("--client-id", 0, "--data-dir", own, *secret)
    return server


REFUSED = {
    "shape": "the activations of client 1: holds float32 .*, but float32 .* is expected",
    "dtype": "holds float64 .*, but float32 .* is expected",
    "samples": r"holds float32 \[63, 400\], but float32 \[64, 400\] is expected",
    "size": "announces a payload of 5000000 bytes; at most",
    "garbage": "the activations of client 1: no whole torch.save file",
    "nan": "the activations of client 1 hold NaN or infinity",
    "huge": "the activations of client 1 hold numbers whose squares overflow",
    "labels": "the labels of client 1",
    "flood": "sent TRAINING_LABELS, expected was TRAINING_FEATURES",
}


@needs_node
@needs_runtime
def test_a_page_trains_as_a_python_client(
    launcher: Launcher, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hostile pages come first; then a good one, which is closed in the middle of a round.

    Another with its samples goes on, which asks for no number, and gives way to no bad luck.
    """
    owns = [Own.of(k, 320, 60) for k in (0, 1)]
    server = start(launcher, tmp_path, owns, "--rounds", 2, "--model", "lenet5", "--batch-size", 64)
    until = {"round": 1, "step": 2}
    code, (refusals,) = run_pages(HOSTILE + TRAIN, site, 1, owns[1], until=until)
    assert code == 7
    start_of = "the server refused this page: "
    wrong = {k: v for k, v in refusals.items() if not re.match(start_of + f".*{REFUSED[k]}", v)}
    assert wrong == {}
    assert refusals.keys() == REFUSED.keys()
    code, (told,) = run_pages(UNLUCKY + TRAIN, site, None, owns[1])
    assert code == 0
    assert told["state"] == "done", told
    assert told["client"] == 1
    assert not any("trying" in note for note in told["notes"])  # it is told only while it is so
    server.ended_with(0)
    launcher.programs[1].ended_with(0)
    assert "client_1 computes with onnxruntime-web 1.30.0 in a browser: its steps" in server.out
    assert server.out.count("the last bit may differ") == 0
    assert "client_1 failed" not in server.out  # a page that tries again does not say so
    own = owns[1].write(tmp_path / "own_1")
    assert check_steps(launcher.folder / "server/r", 1, own) == 8
    assert main_replay([str(launcher.folder / "server/r")]) == 0
    assert re.search(r"\d+ gradients checked, 0 differ", capsys.readouterr().out)


def check_steps(run: Path, client: int, data_dir: Path) -> int:
    """Compute a page's steps with torch, from the recorded gradients; return their number."""
    config = sfl.open_run(run).config
    recipe, spec = Recipe.of(config), DATASETS["mnist-5k"]
    data = load_own(spec, config, client, data_dir, say=lambda line: None)
    split = SplitModel(recipe, spec.input_shape, 10)
    segments = split.segments(Holder.CLIENT, torch.device("cpu"))
    state, count = split.front_state(), 0
    for index in range(config.rounds):
        segments.load(split.by_segment(state))
        segments.start_round(index)
        folder = run / f"client_files/client_{client}/round_{index:03d}"
        drawn = batch_indices(len(data.train), config, round_index=index, client=client)
        for step, rows in enumerate(drawn):
            at = Position("r", index, step, client)
            x, _ = data.training_batch(rows, at)
            z = segments.first.forward(x, at)
            theirs, grads = (
                decode(
                    (folder / f"{kind}_{index}_{step}.pt").read_bytes(),
                    split.features_spec(len(x)),
                    kind,
                )
                for kind in ("split_layer_tensor", "grads")
            )
            assert (z - theirs).abs().max() < 1e-4
            segments.first.backward(grads)
            segments.update_weights()
            count += 1
        name = f"models/client_{client}_{index:03d}.pt"
        theirs_after = decode_state((run / name).read_bytes(), split.front_spec, name)
        for key, ours in segments.first.state().items():
            assert (ours - theirs_after[key]).abs().max() < 1e-4, (index, key)
        name = f"models/client_model_{index:03d}.pt"
        state = decode_state((run / name).read_bytes(), split.front_spec, name)
    return count


PART = "((name) => document.querySelector(`#training [data-is=${name}]`).innerText)"
BEGIN = """
(async () => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const part = ({ pixels, labels }) => ({ pixels: bytes(pixels), labels });
  const { train, test, client, sends } = GIVEN;
  const send = WebSocket.prototype.send;
  let left = sends ?? Infinity;
  WebSocket.prototype.send = function (data) {  // of a tab that hangs after so many messages
    if (!this.url.includes("/train")) send.call(this, data);
    else if (left-- > 0) send.call(this, data);
    else window.hangs = true;
  };
  sfl.training.setSamples({ train: part(train), test: part(test) });
  sfl.training.start(client);
})()
"""


def begin(tab: Tab, own: Own, client: int, **more: Any) -> None:
    """Let a tab take part."""
    tab.wait_for("window.sfl?.training?.plan")
    given = json.dumps({**own.for_page(), "client": client, **more})
    tab.evaluate(BEGIN.replace("GIVEN", given))


@needs_chromium
@needs_runtime
def test_two_tabs_beside_a_python_client(
    launcher: Launcher, site: str, tmp_path: Path, chromium: Chromium
) -> None:
    """One is closed in the second round, and another goes on with its samples.

    In the third the server is killed, and started again. Meanwhile 50 others hold the site's
    WebSockets, each with half a message.
    """
    owns = [Own.of(k, 480, 200) for k in range(3)]
    one = chromium.open(site)  # before the server is there
    one.wait_for(f"{PART}('about').startsWith('There is no run for this page yet; it looks again')")
    assert "--" not in one.text("#training [data-is=about]")
    one.draw("#pad", [(0.3, 0.3), (0.7, 0.7)])
    one.click("#training [data-is=add]")
    one.wait_for(f"{PART}('state').startsWith('there is no run yet')")
    server = start(launcher, tmp_path, owns, "--rounds", 3, "--model", "mlp", "--batch-size", 32)
    one.wait_for("document.querySelector('#training-label').options.length === 10")
    assert one.text("#training [data-is=state]") == "not started"
    one.evaluate("document.querySelector('#training-label').value = 7")
    one.click("#training [data-is=add]")
    one.wait_for(f"{PART}('samples') === '1 sample (7: 1)'")
    one.evaluate("sfl.training.start(9)")
    one.wait_for(f"{PART}('state') === 'client 9: this run has 0 to 2'")
    one.evaluate("sfl.training.setSamples(null)")
    closed = chromium.open(site)
    begin(one, owns[1], 1)
    begin(closed, owns[2], 2, sends=46)
    closed.wait_for("window.hangs")
    assert closed.evaluate("sfl.training.progress.round") == 1
    closed.close()
    wait_for(server, "client_2 is away")
    other = chromium.open(site)
    with waiting(site, 50) as sockets:
        begin(other, owns[2], 2)
        assert sum(socket.state is State.OPEN for socket in sockets) == 50
        other.wait_for("sfl.training.progress?.round === 2 && sfl.training.progress.step > 2")
        server.process.kill()
        was_killed(server)
        for tab in (one, other):
            tab.wait_for("sfl.training.progress.state === 'lost'")
        server = launcher.server(
            "--resume", launcher.folder / "server/r", "--token-file", tmp_path / "token"
        )
        server.ended_with(0)
        launcher.programs[1].ended_with(0)
    for tab in (one, other):
        tab.wait_for("sfl.training.progress.state === 'done'")
        assert tab.text("#training [data-is=state]") == "the run is over"
        assert tab.errors == []
        check_nothing_leaves(tab, owns[1 if tab is one else 2])
    for k in (1, 2):
        own = owns[k].write(tmp_path / f"own/client_{k}")
        assert check_steps(launcher.folder / "server/r", k, own) == 36
    (tmp_path / "own_0").rename(tmp_path / "own/client_0")
    config = sfl.open_run(launcher.folder / "server/r").config
    node = NodeConfig(out=str(tmp_path / "python"), data_dir=str(tmp_path / "own"))
    alone = simulate(config, node)
    with_tabs, in_python = (
        float([*csv.DictReader((run / "rounds.csv").read_text().splitlines())][-1]["test_acc"])
        for run in (launcher.folder / "server/r", alone)
    )
    assert with_tabs > 0.6
    assert abs(with_tabs - in_python) <= 0.01, (with_tabs, in_python)


@contextlib.contextmanager
def waiting(site: str, count: int) -> Iterator[list[ClientConnection]]:
    """Open WebSockets for predictions, each with the first half of a message."""
    half = encode_head(Message(MessageType.REQUEST_INFERENCE))[:40]
    with contextlib.ExitStack() as stack:
        url = site.replace("http", "ws") + "predict"
        sockets = [stack.enter_context(connect(url)) for _ in range(count)]
        for socket in sockets:
            socket.send(half)
        yield sockets


# Sends samples as they are, and normalised as the page does it.
LEAK = """
(async () => {
  const { normalised, scaled } = await import("/normalise.js");
  const socket = new WebSocket(new URL("predict", location.href.replace("http", "ws")));
  await new Promise((resolve) => (socket.onopen = resolve));
  const bytes = Uint8Array.from(atob(PIXELS), (letter) => letter.charCodeAt(0));
  for (const x of [bytes, normalised(scaled(bytes), sfl.training.plan)]) socket.send(x);
  socket.close();
})()
"""


def check_nothing_leaves(tab: Tab, own: Own) -> None:
    """Look for the samples in what a tab sent: as bytes, and normalised.

    Then let the page send the sixth, and see that both are found.
    """
    plain = torch.from_numpy(own.x)
    normalised = plain.float().div(255).sub(0.1307).div(0.3081)
    rows = [row.numpy().tobytes() for x in (plain, normalised) for row in x[:, 0, 12:16].flatten(1)]

    def found() -> list[int]:
        sent = b"".join(frame.data for frame in tab.frames if frame.sent)
        assert len(sent) > 10**6
        return [index for index, row in enumerate(rows) if row in sent]

    assert found() == []
    sixth = base64.b64encode(own.x[5].tobytes()).decode()
    tab.evaluate(LEAK.replace("PIXELS", json.dumps(sixth)))
    eventually(lambda: len(found()) == 2)
    assert found() == [5, 5 + len(plain)]
