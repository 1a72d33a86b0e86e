"""A trained model as a file for others: each kind, each part, and who uses it without SFL."""

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sfl
from sfl.cli import main_export
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError
from sfl.model.fusion import pack
from sfl.model.portable import About, read_portable
from sfl.model.zoo import MODELS, build, model_spec, split
from sfl.runtime.start_weights import checksum_of
from sfl.trained.kinds import KINDS, MOST_DIFFERENCE, NUM_SAMPLES
from tests.support.programs import run_program

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/trained-models.md").read_text()
PARTS = ("front", "back", "whole")


def run_of(out: Path, **options: object) -> sfl.Run:
    small = {"rounds": 1, "run": "first", "batch_size": 64, "keep_tensors": "none"}
    return sfl.simulate(RunConfig(**small | options), out=str(out))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sfl.Run:
    return run_of(tmp_path_factory.mktemp("run"), model="lenet5", rounds=2)


@pytest.fixture(scope="module")
def folder(run: sfl.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file of every part, by the names that they get by default."""
    folder = tmp_path_factory.mktemp("files")
    for to, kind in KINDS.items():
        for part in PARTS:
            done = sfl.export(run, to, part, out=folder / f"first_{part}{kind.suffix}")
            assert done.round == 1
    return folder


def onnx_of(path: Path) -> tuple[object, str]:
    session = onnxruntime.InferenceSession(path)
    return (
        lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]),
        session.get_modelmeta().custom_metadata_map["about"],
    )


def exported_of(path: Path) -> tuple[object, str]:
    texts = {"about": ""}
    return torch.export.load(path, extra_files=texts).module(), texts["about"]


def torch_of(path: Path) -> tuple[object, str]:
    """Return the weights in a model that was never cut, or in the blocks of one side."""
    read = read_portable(path)
    model = build(model_spec(read.about.model), read.about.input_shape, 10, seed=9)
    front, back = split(model, *read.about.cuts)
    part = {"whole": model, "front": front, "back": back}[read.about.part].eval()
    part.load_state_dict(dict(read.state))
    return part, read.about.to_json()


LOADERS = {"torch": torch_of, "exported": exported_of, "onnx": onnx_of}


@pytest.mark.slow
@pytest.mark.parametrize("to", LOADERS)
def test_whole_and_halves_are_the_trained_model(run: sfl.Run, folder: Path, to: str) -> None:
    paths = {part: folder / f"first_{part}{KINDS[to].suffix}" for part in PARTS}
    parts = {part: LOADERS[to](path)[0] for part, path in paths.items()}
    with torch.no_grad():
        for client in range(3):
            for x, _ in run.batches("test", client):  # 256 samples, and the rest
                ours = run.model()(x)
                for theirs in (parts["whole"](x), parts["back"](parts["front"](x))):
                    assert torch.equal(theirs.argmax(1), ours.argmax(1))
                    assert float((theirs - ours).abs().max()) <= MOST_DIFFERENCE
                    assert to != "torch" or torch.equal(theirs, ours)
        assert parts["whole"](x[:1]).shape == (1, 10)


def test_every_kind_says_the_same_of_itself(run: sfl.Run, folder: Path) -> None:
    for part in PARTS:
        said = {LOADERS[to](folder / f"first_{part}{KINDS[to].suffix}")[1] for to in KINDS}
        assert len(said) == 1
        assert json.loads(said.pop()) == {
            "part": part, "model": "lenet5", "cuts": [7], "task": "classification",
            "input_shape": [1, 28, 28], "takes": [400] if part == "back" else [1, 28, 28],
            "mean": [0.1307], "std": [0.3081], "classes": list("0123456789"), "run": "first",
            "seed": 0, "round": 1, "back_checksum": checksum_of(run.back().state_dict()),
            "sfl_version": sfl.__version__, "format": 1,
        }  # fmt: skip


(SECTION,) = re.findall(r"^### Load it without SFL\n(.*?)^###? ", PAGE, re.M | re.S)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)
ALONE = "import sys; sys.modules['sfl'] = None\n"
KEEP = "import numpy; numpy.savez('used.npz', x=numpy.asarray(pixels), y=numpy.asarray({}))\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("snippet", "part"), [*zip(SNIPPETS, ["front", "whole", "whole"], strict=True)]
)
def test_a_stranger_uses_it_as_the_page_shows(
    run: sfl.Run, folder: Path, snippet: str, part: str
) -> None:
    keep = KEEP.format("outputs.detach()" if "import torch" in snippet else "outputs")
    code = ALONE + snippet + keep
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(folder / "used.npz") as used:
        pixels, outputs = torch.from_numpy(used["x"]), torch.from_numpy(used["y"])
    module = run.front() if part == "front" else run.model()
    with torch.no_grad():
        ours = module((pixels - 0.1307) / 0.3081)
    assert torch.allclose(outputs, ours, atol=MOST_DIFFERENCE, rtol=0)
    if part == "whole":
        assert done.stdout == f"{[str(int(index)) for index in ours.argmax(1)]}\n"


@pytest.mark.slow
def test_the_program_is_silent_but_for_its_lines(run: sfl.Run, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    done = run_program("-m", "experiments.export", run.path, "--to", "onnx", "--out", out)
    checked, written = done.stdout.splitlines()
    found = re.fullmatch(r"onnxruntime and torch differ by at most (.*) on made-up .*", checked)
    assert found is not None
    assert 0 < float(found[1]) < 1e-5
    size = f"{out.stat().st_size:,}"
    assert (
        written == f"whole of first after round 2 (lenet5, takes [1, 28, 28]): {out}, {size} bytes"
    )
    assert done.stderr == ""


WRONG = {
    "--to onx": (2, "unknown kind of file 'onx'; did you mean onnx?"),
    "--to torch --part nose": (1, "no segment nose; it has front, back"),
    "--to torch --round 2": (1, "has finished 2 rounds, from 0; -1 is before the first"),
    "--to torch --client 7": (1, "has no client_7"),
    "--to torch --part back --client 1": (2, "--client 1: the back is the server's"),
    "--to torch --out no/such.pt": (1, "No such file or directory"),
    "--to exported --out a.pt": (
        2,
        "--out a.pt: a file of --to exported has a name that ends in .pt2",
    ),
    "": (2, "the following arguments are required: --to"),
}


@pytest.mark.parametrize("options", WRONG)
def test_what_cannot_be_done_is_said_in_a_line(
    run: sfl.Run, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = WRONG[options]
    assert main_export([str(run.path), *options.split()]) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("export: error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_round_and_a_client_are_named(
    run: sfl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, name, after, expected in (
        (["--part", "front"], "first_front.pt", 1, run.front()),
        (["--part", "front", "--round", "0"], "first_front.pt", 0, run.front(round=0)),
        (["--client", "1"], "first_whole_client_1.pt", 1, run.model(client=1)),
        (["--round", "-1"], "first_whole.pt", -1, run.model(round=-1)),
    ):
        assert main_export([str(run.path), "--to", "torch", *options]) == 0
        read = read_portable(tmp_path / name)
        wanted = expected.state_dict()
        assert read.state.keys() == wanted.keys()
        assert all(torch.equal(read.state[key], wanted[key]) for key in wanted)
        assert read.about.round == after
        assert read.about.back_checksum == checksum_of(run.back(after).state_dict())


def test_a_run_keeps_its_name_in_another_folder(run: sfl.Run, tmp_path: Path) -> None:
    moved = shutil.copytree(run.path, tmp_path / "server/moved")
    done = sfl.export(sfl.open_run(moved), "torch", "front", out=tmp_path / "front.pt")
    assert done.about.run == "first"


def test_a_missing_package_is_named(
    run: sfl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript is not installed .* -m pip install onnx "):
        sfl.export(run, "onnx", out=tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_computes_otherwise_is_not_written(tmp_path: Path) -> None:
    """Float32 keeps 7 digits: of outputs as large as these, the first part of 1e-4 alone."""
    own = run_of(tmp_path, model="tests.support.models:with_huge_layer", cut=3)
    with pytest.raises(RunError, match=r"differ by .* in an output of the front, more than 1e-04"):
        sfl.export(own, "onnx", "front", out=tmp_path / "a.onnx")
    assert not list(tmp_path.glob("a.onnx*"))


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    name = "tests.support.models:branching"
    own = run_of(tmp_path, model=name, cut=2)
    for to in ("onnx", "exported"):
        with pytest.raises(
            RunError, match=r"exporter does not take the back of .*:branching: "
        ) as e:
            sfl.export(own, to, "back", out=tmp_path / f"a{KINDS[to].suffix}")
        assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("a.*"))
    sfl.export(own, "torch", "back", out=tmp_path / "a.pt")
    assert read_portable(tmp_path / "a.pt").about.model == name


def test_the_segments_of_other_topologies(tmp_path: Path) -> None:
    u_shaped = run_of(tmp_path / "u", model="lenet5", cut="3,9")
    x, _ = next(u_shaped.batches("test"))
    with torch.no_grad():
        z = exported_of(sfl.export(u_shaped, "exported", "front", out=tmp_path / "front.pt2").path)[
            0
        ](x)
        for name, takes in (("back", (6, 14, 14)), ("client_head", (120,))):
            model, text = exported_of(
                sfl.export(u_shaped, "exported", name, out=tmp_path / f"{name}.pt2").path
            )
            assert About.from_json(text.encode()).takes == takes
            assert About.from_json(text.encode()).cuts == (3, 9)
            z = model(z)
        assert torch.allclose(z, u_shaped.model()(x), atol=MOST_DIFFERENCE, rtol=0)


class Talks(nn.Module):
    """Says something while it is exported, as parts of torch's exporter do."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("of the exporter", stacklevel=1)
        logging.getLogger("torch.onnx").warning("of the exporter")
        return x + 1


@pytest.mark.parametrize("to", ["onnx", "exported"])
def test_what_the_exporter_says_is_not_shown(to: str, caplog: pytest.LogCaptureFixture) -> None:
    part = nn.Sequential(OrderedDict(talks=Talks(), fc=nn.Linear(3, 10)))
    KINDS[to].make(part, torch.randn(NUM_SAMPLES, 3), about_of("mlp", "whole", (3,)))
    logging.getLogger("torch.onnx").warning("later")
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == ["later"]
    with pytest.warns(UserWarning, match="later"):
        warnings.warn("later", stacklevel=1)


def test_each_clients_own_front_wants_its_name(tmp_path: Path) -> None:
    own = run_of(tmp_path, model="mlp", scheme="sflv3")
    with pytest.raises(RunError, match="say whose, with client= or --client, of 0, 1, 2"):
        sfl.export(own, "torch", out=tmp_path / "a.pt")
    weights = [
        read_portable(sfl.export(own, "torch", client=k, out=tmp_path / f"{k}.pt").path).state
        for k in range(2)
    ]
    assert torch.equal(weights[0]["fc3.weight"], weights[1]["fc3.weight"])
    assert not torch.equal(weights[0]["fc1.weight"], weights[1]["fc1.weight"])


def test_a_vertical_run_in_parts(tmp_path: Path) -> None:
    options = {"partition": "vertical", "topology": "vertical", "model": "mlp"}
    run = run_of(tmp_path, **options)
    with pytest.raises(ConfigError, match="each client has a front of its own: write each with"):
        sfl.export(run, "torch")
    parts = [next(run.batches("test", k))[0] for k in range(3)]
    activations = []
    with torch.no_grad():
        for k, x in enumerate(parts):
            path = sfl.export(run, "exported", "front", client=k, out=tmp_path / f"{k}.pt2").path
            model, text = exported_of(path)
            assert About.from_json(text.encode()).input_shape == tuple(x.shape[1:])
            activations.append(model(x).flatten(1))
        back, text = onnx_of(sfl.export(run, "onnx", "back", out=tmp_path / "back.onnx").path)
        z = torch.cat(activations, dim=1)
        assert About.from_json(text.encode()).takes == tuple(z.shape[1:])
        assert torch.allclose(back(z), run.model()(*parts), atol=MOST_DIFFERENCE, rtol=0)


def test_what_follows_the_fronts_lies_at_hop_and_server(tmp_path: Path) -> None:
    """The hop takes all clients' activations, the server the hop's; the model is the label's."""
    options = {"partition": "vertical", "topology": "extended-vanilla", "clients": 2}
    models = {"party_models": "mlp,lenet5", "label_client": 1, "cut": "7,9", "model": "lenet5"}
    run = run_of(tmp_path, **options | models)
    parts = [next(run.batches("test", k))[0] for k in range(2)]
    with pytest.raises(RunError, match="no predictions of client_0: client_1 has those of all"):
        run.predictions(0)
    recorded = run.predictions(1)["logits"]
    with torch.no_grad():
        z = run.model()(*parts)
        assert torch.equal(z, recorded[: len(z)])
        z = pack([run.front(client=k)(x) for k, x in enumerate(parts)])
        for part in ("hop_1", "back"):
            done = sfl.export(run, "exported", part, out=tmp_path / f"{part}.pt2")
            assert (done.about.model, done.about.takes) == ("lenet5", tuple(z.shape[1:]))
            z = exported_of(done.path)[0](z)
        assert torch.allclose(z, recorded[: len(z)], atol=MOST_DIFFERENCE, rtol=0)
    with pytest.raises(ConfigError, match="the hop_1 is the hop:1's; leave --client out"):
        sfl.export(run, "torch", "hop_1", client=0)


SHAPES = {"alexnet": (3, 64, 64), "resnet18": (3, 64, 64), "vgg16": (3, 32, 32),
          "resnet50": (3, 32, 32), "cnn-cifar10": (3, 32, 32)}  # fmt: skip
LARGE = ("vgg16", "resnet50")  # 15 seconds for a file: of these, the halves alone


def about_of(model: str, part: str, takes: tuple[int, ...]) -> About:
    return About(
        part=part, model=model, cuts=(3,), task="classification", input_shape=takes, takes=takes,
        mean=(0.5,), std=(0.5,), classes=tuple("0123456789"), run="r", seed=1,
        round=0, back_checksum="", sfl_version=sfl.__version__,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_built_in_model_becomes_onnx(name: str, tmp_path: Path) -> None:
    shape, spec = SHAPES.get(name, (1, 28, 28)), model_spec(name)
    model = build(spec, shape, 10, seed=1).eval()
    assert spec.cut is not None
    front, back = (half.eval() for half in split(model, spec.cut))
    x = torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(x)

    def computed(part: str, module: nn.Module, samples: Tensor) -> Tensor:
        about = about_of(name, part, tuple(samples.shape[1:]))
        path = tmp_path / "a.onnx"
        path.write_bytes(KINDS["onnx"].make(module, samples, about).data)  # refused if it differs
        output: Tensor = onnx_of(path)[0](samples)
        return output

    found = [computed("back", back, computed("front", front, x))]
    found += [] if name in LARGE else [computed("whole", model, x)]
    for theirs in found:
        assert float((theirs - ours).abs().max()) <= MOST_DIFFERENCE
        assert torch.equal(theirs.argmax(1), ours.argmax(1))


def test_two_threads_export_at_once(run: sfl.Run, tmp_path: Path) -> None:
    """As a site does whose pages ask for two files: torch's exporter fails if it is not alone."""
    parts = ("front", "whole")
    with ThreadPoolExecutor(len(parts)) as threads:
        done = [
            threads.submit(sfl.export, run, "onnx", part, out=tmp_path / f"{part}.onnx")
            for part in parts
        ]
    assert [future.result().about.part for future in done] == list(parts)
