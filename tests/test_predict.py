"""Predictions of a trained model: here, and with its back at a server."""

import contextlib
import csv
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import sfl
from sfl.cli import predict_parser
from sfl.errors import ConfigError, DataError, RunError, SflError
from sfl.files.torch_file import encode_file
from sfl.model.portable import Portable, read_portable, write_portable
from sfl.nodes import ClientNode, ServerNode
from sfl.trained import models
from sfl.trained.kinds import KINDS
from sfl.trained.models import read_front
from sfl.trained.predict import predict
from sfl.trained.service import open_service
from sfl.wire.framing import encode_head
from sfl.wire.messages import Message, MessageType
from tests.support.certificates import Certificates
from tests.support.dial import dial
from tests.support.handshakes import TOKEN, token_file
from tests.support.launch import Launcher, Program, send_signal, wait_for
from tests.support.requesters import CPU, Requester
from tests.support.simulations import simulated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one round with their fronts, and some images."""
    out = tmp_path_factory.mktemp("trained")
    for name, options in {"r": {}, "u": {"cut": "3,9"}, "alone": {"scheme": "sflv3"}}.items():
        path = simulated(out, model="lenet5", rounds=1, run=name, **options)
        run = sfl.open_run(path)
        if name == "u":
            sfl.export(run, "torch", "client_head", out=out / "u_head.pt")
        if name != "alone":
            sfl.export(run, "torch", "front", out=out / f"{name}_front.pt")
    return out


@pytest.fixture(scope="module")
def run(folder: Path) -> sfl.Run:
    return sfl.open_run(folder / "server/r")


@pytest.fixture(scope="module")
def images(folder: Path, run: sfl.Run) -> Path:
    """30 test samples of client 0, of all classes, in folders named as these."""
    test = run.data(0).test
    for i, row in enumerate(range(0, 330, 11)):  # they are sorted by class
        path = folder / f"images/{int(test.y[row])}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.x[row, 0].numpy()).save(path)
    return folder / "images"


def predicted(*argv: object) -> None:
    predict(predict_parser("predict").parse_mixed_args([str(a) for a in argv]))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# On one machine


def test_a_hops_folder_has_no_figures_to_compare_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is said before anything is computed."""
    hop = tmp_path / "hop_1/r"
    simulated(tmp_path, model="mlp", topology="multi-hop", cut="2,4", rounds=1)
    capsys.readouterr()
    with pytest.raises(
        RunError, match=r"hop_1/r has no rounds\.csv: give the folder of a server's"
    ):
        predicted(hop, "--test-of", hop)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_test_set_gives_the_recorded_figures_and_predictions(
    run: sfl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted(run.path, "--test-of", run.path, "--csv", tmp_path / "all.csv")
    out = capsys.readouterr().out
    row = run.rounds.iloc[-1]
    figures = f"test_loss {float(row['test_loss'])!r}, test_acc {float(row['test_acc'])!r}"
    assert f"{figures}: exactly as in rounds.csv" in out
    shares = torch.cat([run.predictions(k)["logits"] for k in range(3)]).softmax(1)
    labels = torch.cat([run.predictions(k)["labels"] for k in range(3)]).tolist()
    rows = rows_of(tmp_path / "all.csv")
    assert [row["label"] for row in rows] == [str(label) for label in labels]
    for name, share, rank in (
        ("class", "probability", 0), ("second", "probability_2", 1), ("third", "probability_3", 2)
    ):  # fmt: skip
        values, classes = shares.topk(3).values[:, rank], shares.topk(3).indices[:, rank]
        assert [row[share] for row in rows] == [repr(v) for v in values.tolist()]
        assert [row[name] for row in rows] == [str(k) for k in classes.tolist()]


def test_images_are_read_as_the_data_set_is(
    run: sfl.Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "mode"
    other.mkdir()
    with Image.open(next(images.glob("*/00.png"))) as image:
        for name, mode in (("a.png", "RGBA"), ("b.gif", "P"), ("c.bmp", "RGB"), ("d.png", "L")):
            image.convert(mode).save(other / name)
        image.resize((90, 40)).save(other / "e.png")
    (other / "notes.txt").write_text("no image")
    predicted(run.path, images, other, "--csv", tmp_path / "all.csv")
    out = capsys.readouterr().out
    assert "left out: 1 no image by its suffix (notes.txt)" in out
    rows = {Path(row["file"]).name: row for row in rows_of(tmp_path / "all.csv")}
    assert len(rows) == 35
    data = run.data(0)
    x, y = data.batch(data.test, slice(0, 330, 11))
    with torch.no_grad():
        found = run.model()(x).softmax(1)
    for i in range(30):
        row = rows[f"{i:02}.png"]
        assert row["label"] == str(int(y[i]))
        assert row["class"] == str(int(found[i].argmax()))
        assert float(row["probability"]) == pytest.approx(float(found[i].max()), rel=1e-5)
    assert {rows[name]["probability"] for name in ("a.png", "b.gif", "c.bmp", "d.png")} == {
        rows["a.png"]["probability"]
    }
    assert rows["e.png"]["probability"] != rows["d.png"]["probability"]
    right = int((found.argmax(1) == y).sum())
    assert f"accuracy {right / 30:.4f}, " in out
    assert ", over 30 samples whose class is known" in out
    assert "warning" not in out


def test_black_on_white_is_told(
    run: sfl.Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in images.glob("*/*.png"):
        with Image.open(path) as image:
            ImageOps.invert(image).save(tmp_path / path.name)
    predicted(run.path, tmp_path)
    assert "standard deviations lighter than the model's training data" in capsys.readouterr().out


def test_arrays_with_labels_and_without(
    run: sfl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = run.data(1).test
    x, y = test.x[:, 0].numpy(), test.y.numpy()
    many = np.tile(x, (10_000 // len(x) + 1, 1, 1))[:10_000]
    np.savez(tmp_path / "many.npz", x=many)
    names = np.array([str(k) for k in reversed(range(10))])  # numbered otherwise than the run's
    np.savez(
        tmp_path / "named.npz", x=x[:9], y=9 - y[:9], x_test=x, y_test=9 - y, classes=names
    )  # fmt: skip
    predicted(run.path, tmp_path / "many.npz", "--csv", tmp_path / "a.csv")
    predicted(run.path, tmp_path / "many.npz")
    out = capsys.readouterr().out
    assert "accuracy" not in out
    assert "... and 9950 more: --csv FILE writes all" in out
    predicted(run.path, tmp_path / "named.npz", "--csv", tmp_path / "b.csv")
    assert f"over {9 + len(x)} samples" in capsys.readouterr().out
    many_rows, named = rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv")
    assert len(many_rows) == 10_000
    assert named[0]["file"] == f"{tmp_path / 'named.npz'}:x[0]"
    assert named[-1]["file"] == f"{tmp_path / 'named.npz'}:x_test[{len(x) - 1}]"
    assert [r["label"] for r in named] == [str(k) for k in [*y[:9], *y]]
    assert {r["label"] for r in many_rows} == {""}
    wanted = [r["class"] for r in many_rows[: len(x)]]
    assert [r["class"] for r in named] == [*wanted[:9], *wanted]


def test_what_cannot_be_predicted_is_one_line(run: sfl.Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.png").write_bytes(b"no image at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign/cat").mkdir(parents=True)
    np.savez(tmp_path / "nan.npz", x=np.full((2, 28, 28), np.nan, np.float32))
    np.savez(tmp_path / "others.npz", x=np.zeros((2, 28, 28), np.uint8), y=np.array(["0", "cat"]))
    for name, said in {
        "none.png": "cannot read the image .*none.png: cannot identify",
        "empty": "empty holds no images",
        "missing.png": "missing.png: there is no such file or folder",
        "foreign": "has folders 1 .cat., which are none of the model's classes",
        "nan.npz": "x holds floats outside .0, 1., or NaN",
        "others.npz": "has classes 1 .cat., which are none of the model's",
    }.items():
        with pytest.raises(DataError, match=said):
            predicted(run.path, tmp_path / name)
    for argv, said in {
        (): "give a run's folder, or --server",
        (run.path,): "give images, a folder of them",
        (run.path, tmp_path, "--test-of", run.path): "give images, .*; or --test-of",
        (run.path, tmp_path, "--csv", tmp_path): "--csv .*: is a folder",
        (run.path, tmp_path, "--csv", tmp_path / "no/a.csv"): "--csv .*: there is no folder .*no",
        (run.path, tmp_path, "--front", "x"): "--server and --front: give both",
        ("--server", "h:1", tmp_path): "--server and --front: give both",
        (run.path, tmp_path, "--token-file", "t", "--link", "1mbit"): "--token-file, --link: only",
        (run.path, tmp_path, "--data-dir", "d"): "--data-dir: only --test-of has a use for this",
        ("--server", "h:1", "--front", "x", "--round", 0, tmp_path): "--round: ",
        ("--server", "h:1", "--front", "x", "--client", 0, tmp_path): "--client: ",
    }.items():
        with pytest.raises(ConfigError, match=said):
            predicted(*argv)
    with pytest.raises(SflError, match="keeps a front of its own"):
        predicted(folder / "server/alone", tmp_path)


def test_the_model_of_a_run_that_diverged_is_used_for_nothing(tmp_path: Path) -> None:
    """Its outputs are NaN, of which the first class is the largest."""
    nan = {"on_nonfinite": "log", "optimizer": "sgd", "lr": 1e20}
    path = simulated(tmp_path, model="mlp", rounds=1, batch_size=800, **nan)
    diverged, image = sfl.open_run(path), tmp_path / "a.npz"
    np.savez(image, x=np.zeros((2, 28, 28), np.uint8))
    said = "weights after round 1 hold NaN, .*: the run has diverged"
    with pytest.raises(RunError, match=said):
        predicted(path, image)
    for to, part in ("onnx", "whole"), ("torch", "front"):
        with pytest.raises(RunError, match=said):
            sfl.export(diverged, to, part, out=tmp_path / f"a{KINDS[to].suffix}")
    with pytest.raises(RunError, match=said), open_service(ServerNode(serve=str(path), port=0)):
        pass


def test_a_round_that_was_not_tested_has_no_figures_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simulated(tmp_path, model="mlp")
    for index, when in ((0, "after round 1"), (-1, "before the first round")):
        predicted(run, "--test-of", run, "--round", index)
        said = capsys.readouterr().out
        assert f"; {run} has no test figures {when}\n" in said
    predicted(run, "--test-of", run)
    assert "exactly as in rounds.csv" in capsys.readouterr().out


def test_a_front_of_ones_own_is_predicted_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = folder / "server/alone"
    predicted(alone, "--test-of", alone, "--client", 1)
    model = sfl.open_run(alone)
    logits = model.predictions(1)
    right = int((logits["logits"].argmax(1) == logits["labels"]).sum())
    assert f"accuracy {right / len(logits['labels']):.4f}" in capsys.readouterr().out


# With the back at a server


def serve(launcher: Launcher, run: Path, *options: object) -> Program:
    server = launcher.server("--serve", run, *options)
    wait_for(server, "listening")
    return server


@pytest.mark.parametrize(
    ("launcher", "protected"), [("ws", False), ("tcp", True)], indirect=["launcher"]
)
def test_split_inference_over_sockets_gives_the_runs_figures(
    launcher: Launcher,
    certificates: Certificates,
    folder: Path,
    images: Path,
    tmp_path: Path,
    protected: bool,
) -> None:
    """With a token and TLS, or without; several requesters at once."""
    theirs, ours = [], []
    if protected:
        token = token_file(tmp_path, TOKEN)
        theirs = ["--token-file", token, *certificates.issue("server")]
        ours = ["--token-file", token, "--tls-ca", certificates.trust]
    name = "u" if protected else "r"
    run, front = folder / f"server/{name}", folder / f"{name}_front.pt"
    files = f"{front},{folder / 'u_head.pt'}" if name == "u" else front
    server = serve(launcher, run, *theirs)
    tests = [launcher.predict("--front", files, "--test-of", run, *ours) for _ in range(2)]
    of_images = launcher.predict("--front", files, images, "--csv", tmp_path / "a.csv", *ours)
    for program in (*tests, of_images):
        program.ended_with(0)
    row = sfl.open_run(run).rounds.iloc[-1]
    figures = f"test_loss {float(row['test_loss'])!r}, test_acc {float(row['test_acc'])!r}"
    for program in tests:
        assert f"{figures}: exactly as in rounds.csv" in program.out
        assert "6 batches: median latency " in program.out
    predicted(run, images, "--csv", tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    if protected:
        line = launcher.predict("--front", files, images, *ours[2:]).ended_with(1)
        assert "the server refused: this server asks for a token: give --token-file" in line
    send_signal(server, signal.SIGTERM)
    server.ended_with(3)
    assert "served 2030 samples in all" in server.out


@pytest.fixture
def server(launcher: Launcher, folder: Path) -> Program:
    return serve(launcher, folder / "server/r")


def test_a_front_that_does_not_fit_is_refused_in_one_line(
    launcher: Launcher, server: Program, folder: Path, images: Path
) -> None:
    both = f"{folder / 'u_front.pt'},{folder / 'u_head.pt'}"
    line = launcher.predict("--front", both, images).ended_with(1)
    assert "the front that you give has cut '3,9', but the model that is served here '7'" in line
    line = launcher.predict("--front", folder / "u_front.pt", images).ended_with(2)
    assert "given is front; the client's part of lenet5 cut at 3,9, u-shaped is front and " in line
    assert "export them, and give the 2 files, with a comma between them" in line
    line = launcher.predict("--front", folder / "missing.pt", images).ended_with(1)
    assert "missing.pt: No such file or directory" in line
    line = launcher.client().ended_with(1)
    assert "sent REGISTER, expected was REQUEST_INFERENCE" in line


def test_a_strange_front_is_refused_before_its_model_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = read_portable(folder / "r_front.pt")
    about, path = front.about, tmp_path / "front.pt"
    monkeypatch.setattr(models, "SplitModel", None)

    def refused(said: str, state: Mapping[str, torch.Tensor] = front.state, **changes: Any) -> None:
        write_portable(path, Portable(state, dataclasses.replace(about, **changes)))
        with pytest.raises(SflError, match=said) as error:
            read_front([str(path)], ClientNode(device="cpu"), CPU)
        assert str(error.value).startswith(str(path))

    refused("has 3 values of mean for samples of shape .1, 28, 28.", mean=(0.1, 0.2, 0.3))
    refused("has 2 values of std for samples", std=(0.1, 0.2))
    refused("would take about .* MB of memory here", input_shape=(1, 200_000, 200_000))
    refused("are not those of the front of mlp", model="mlp", cuts=(3,), input_shape=(1, 900, 900))
    monkeypatch.undo()
    state = dict(front.state)
    name, tensor = state.popitem()
    refused("hold NaN, infinity", {**state, name: tensor * torch.nan})


@pytest.fixture
def requester(launcher: Launcher, folder: Path) -> Iterator[Callable[..., Requester]]:
    """Connect requesters with the front of the run r; they are closed at the end."""
    with contextlib.ExitStack() as stack:

        def connect(*, begins: bool = True) -> Requester:
            link = stack.enter_context(dial(f"127.0.0.1:{launcher.port}", timeout_s=10))
            return Requester(link, folder / "r_front.pt", begins=begins)

        yield connect


def test_whoever_misbehaves_is_ended_alone(
    server: Program, requester: Callable[..., Requester], run: sfl.Run
) -> None:
    good = requester()
    features = good.front.split.features_spec(4).shape
    most = good.front.split.evaluation_batch
    z = torch.zeros(features)
    for size, tensor, said in (
        (4, torch.full(features, torch.nan), "hold NaN, infinity or huge numbers"),
        (5, z, "the activations"),  # of another size than was said
        (0, None, f"a batch of 0 samples; served are 1 to {most} at once"),
        (most + 1, None, f"a batch of {most + 1} samples; served are 1 to {most} at once"),
        (most, torch.zeros(2 * most, *features[1:]), "at most"),  # larger than any
    ):
        bad = requester()
        bad.send(size, tensor)
        assert said in bad.refused()
    half = requester()
    half.send(4)
    payload = encode_file(z).data
    head = encode_head(Message(MessageType.INFERENCE_FEATURES, "x", "", "", half.at, payload))
    half.link._transmit([memoryview(head), memoryview(payload)[:100]])
    early = requester(begins=False)
    early.send(4)
    assert "sent INFERENCE_BATCH, expected was REQUEST_INFERENCE" in early.refused()
    half.link.close()
    wait_for(server, "in the middle of a message's payload")
    with torch.no_grad():
        wanted = run.model()(torch.zeros(4, 1, 28, 28))
    assert torch.equal(good.infer(), wanted)  # all the while


def test_a_server_that_is_gone_is_said(
    launcher: Launcher, server: Program, folder: Path, tmp_path: Path
) -> None:
    front = folder / "r_front.pt"
    x = np.zeros((20_000, 28, 28), np.uint8)
    np.savez(tmp_path / "many.npz", x=x)
    program = launcher.predict("--front", front, tmp_path / "many.npz", "--link", "2mbit,1ms")
    wait_for(program, "many.npz: 20000 samples")
    server.process.kill()
    assert "the server closed the connection" in program.ended_with(1)


def test_what_cannot_be_served_is_refused(launcher: Launcher, folder: Path) -> None:
    fl = simulated(folder, model="lenet5", rounds=1, run="fl", scheme="fl")
    for options, code, said in (
        (["--serve", fl], 2, "with --scheme fl the server holds no part of the model"),
        (["--serve", fl, "--rounds", 3], 2, "--serve: the model is trained; leave out"),
        (["--serve", fl, "--resume", fl], 2, "--serve: leave out --resume: nothing is trained"),
        (
            ["--serve", fl, "--init", fl, "--min-clients", 2, "--profile"],
            2,
            "--serve: leave out --init, --profile, --min-clients: nothing is trained",
        ),
        (["--serve", folder / "none"], 1, "none"),
    ):
        assert said in launcher.server(*options).ended_with(code)
