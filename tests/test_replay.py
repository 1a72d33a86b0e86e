"""Replay: an honest run differs nowhere; one flipped byte in any file is named."""

import io
import random
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from experiments.replay import __main__ as program
from sfl.conversation import passes
from sfl.errors import RunError
from sfl.runtime import replay
from sfl.runtime.recorded_run import load
from tests.support.launch import Launcher
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer_state": "keep", "optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
        {"partition": "sizes:0.3,0.7", "local_epochs": 2, "keep_tensors": "every:2"},
        {"keep_tensors": "last"},
        {"optimizer": "sgd", "lr": 1e10},  # diverges: NaN is NaN
        {"aggregation_weights": "equal", "partition": "sizes:0.3,0.7"},
    ],
)
def test_an_honest_run_differs_nowhere(tmp_path: Path, options: dict[str, object]) -> None:
    run = recorded(tmp_path, **options)
    report = replay.check(load(run))
    assert report.findings == []
    num_files = len(list(run.glob("client_files/*/*/grads_*.pt")))
    assert report.summary == f"{num_files} gradients checked, 0 differ"
    assert num_files >= 16


def test_a_socket_run_differs_nowhere(launcher: Launcher) -> None:
    options = ["--model", BN_DROPOUT, "--cut", 4, "--rounds", 2, "--batch-size", 100]
    options += ["--optimizer-state", "keep"]
    run = launcher.run(*options, client_options=["--allow-import", BN_DROPOUT])
    report = replay.check(load(run))
    assert report.findings == []
    assert report.summary == "66 gradients checked, 0 differ"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("replay"), rounds=2, optimizer_state="keep")


def run_replay(*argv: object) -> tuple[int, list[str]]:
    """Run the program; return its exit code and lines."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["replay", *map(str, argv)])
        code = program.main()
    return code, out.getvalue().splitlines()


def test_one_client_or_round_is_checked_alone(run: Path) -> None:
    whole = ["4 models checked, 0 differ", "32 gradients checked, 0 differ"]
    assert run_replay(run) == (0, whole)
    of_client = ["0 models checked, 0 differ", "16 gradients checked, 0 differ"]
    assert run_replay(run, "--client", 1) == (0, of_client)
    assert run_replay(run, "--round", 1, "--client", 0)[1][-1] == "8 gradients checked, 0 differ"


def test_the_page_shows_how_to_call_it(run: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/programs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, replay.Report] = {}
    exec(code.replace("shared_files/server/first", str(run)), names)
    assert (names["report"].findings, names["report"].checked) == ([], 32)


def test_a_selection_that_holds_nothing_is_an_error(run: Path) -> None:
    for selection in (["--client", 9], ["--round", 77]):
        with pytest.raises(RunError, match="has nothing recorded of that client and round"):
            run_replay(run, *selection)


@pytest.mark.parametrize("keep", ["all", "last"])
def test_tensors_that_are_gone_are_named(tmp_path: Path, keep: str) -> None:
    run = recorded(tmp_path, rounds=2, keep_tensors=keep)
    folder = run / "client_files/client_1/round_001"
    shutil.rmtree(folder)
    code, lines = run_replay(run)
    assert code == 1
    assert lines[0] == f"{folder / 'manifest.jsonl'}: No such file or directory"
    assert not any("server_model" in line for line in lines)
    code, lines = run_replay(run, "--client", 0)
    assert lines[-1] == f"{8 if keep == 'last' else 16} gradients checked, 0 differ"


def listed_files(run: Path) -> list[Path]:
    files = [p for p in sorted(run.rglob("*")) if p.is_file()]
    assert len(files) > 100
    return files


@pytest.mark.slow
def test_one_flipped_byte_in_any_file_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    draw = random.Random(5)
    for path in draw.sample(listed_files(copy), 30) + special_files(copy):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert str(path) in findings(copy), path
        path.write_bytes(whole)
    assert findings(copy) == ""


def special_files(run: Path) -> list[Path]:
    names = [
        "server_log.txt",
        "manifest.jsonl",
        "config.json",
        "environment.json",
        "rounds.csv",
        "rounds/round_001.csv",
    ]
    names += ["models/server_model_init.pt", "models/server_optimizer_1_000.pt"]
    names += ["models/client_model_001.pt", "models/client_0_001.pt", "models/server_model_001.pt"]
    return [run / name for name in names]


def findings(run: Path) -> str:
    """Return what replay says of a run: its findings, or the error that ends it."""
    from sfl.errors import IntegrityError

    try:
        code, lines = run_replay(run)
    except IntegrityError as error:
        return str(error)
    assert code == (1 if len(lines) > 2 else 0)
    return "\n".join(lines[:-2])


def test_what_rests_on_a_damaged_file_is_not_called_different(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "client_files/client_1/round_000/split_layer_tensor_0_2.pt"
    path.write_bytes(path.read_bytes()[:-1])
    code, lines = run_replay(copy)
    assert code == 1
    assert lines[0].startswith(f"{path}: is damaged")
    assert lines[1:] == [
        "5 gradients rest on a damaged file and were not checked",
        "2 models checked, 0 differ",
        "27 gradients checked, 1 differ",
    ]


def test_a_gradient_that_was_recorded_wrongly_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant the bug: the server sends, and records, gradients that are off by one bit."""
    honest = passes.compute

    def off_by_a_bit(*arguments: object) -> object:
        figures, grads = honest(*arguments)
        if arguments[-1].step == 3:
            grads = grads.clone()
            grads.view(torch.int32)[0, 0] ^= 1
        return figures, grads

    with monkeypatch.context() as patch:
        patch.setattr(passes, "compute", off_by_a_bit)
        run = recorded(tmp_path, rounds=1, clients=1)
    code, lines = run_replay(run)
    path = run / "client_files/client_0/round_000/grads_0_3.pt"
    assert (code, lines) == (
        1,
        [
            f"{path}: differs from the recomputed gradients",
            "2 models checked, 0 differ",
            "16 gradients checked, 1 differ",
        ],
    )


def test_an_average_that_was_computed_wrongly_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfl.strategy import aggregate

    monkeypatch.setattr(aggregate, "fed_avg", lambda states, *_: dict(states[0]))
    run = recorded(tmp_path, rounds=1)
    monkeypatch.undo()
    _, lines = run_replay(run)
    names = [line.partition(":")[0].removeprefix(f"{run}/") for line in lines]
    assert names[:2] == ["models/server_model_000.pt", "models/client_model_000.pt"]


def test_another_back_is_trained_offline(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "back.pt"
    code, lines = run_replay(run, "--train-back", "--epochs", 4, "--save", saved, "--seed", 9)
    assert code == 0
    assert lines[0] == "round 2/2: 13 steps to train on, 3 held out"
    losses = [float(line.split("train_loss ")[1].split(",")[0]) for line in lines[1:5]]
    assert losses == sorted(losses, reverse=True)
    state = torch.load(saved, weights_only=True)
    theirs = torch.load(run / "models/server_model_001.pt", weights_only=True)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in theirs.items()}
    assert run_replay(run, "--train-back", "--epochs", 4, "--seed", 9)[1] == lines[:5]
