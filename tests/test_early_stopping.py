"""``--stop-when`` and ``--keep-models best``: the same rounds however the run is run."""

import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments.predictions.reading import read_predictions
from sfl.archive.round_log import read_summary
from sfl.config import RunConfig
from sfl.crash import VARIABLE
from sfl.errors import ConfigError, RunError
from sfl.nodes import NodeConfig
from sfl.reports.watch_state import Watched
from sfl.reports.watch_view import frame
from sfl.runtime.recorded_run import load
from sfl.runtime.replay import check
from sfl.runtime.simulation import simulate
from sfl.strategy.early_stopping import BestRound
from sfl.strategy.recipe import Recipe
from sfl.values import KeepModels, StopWhen
from tests.support.launch import Launcher, options_of, was_killed
from tests.support.made_data import write_own
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal

# The validation loss is best in round 5: 1.063, 0.572, 0.399, 0.378, 0.332, 0.334, 0.341, ...
RUN: dict[str, object] = {
    "model": "mlp", "clients": 2, "batch_size": 100, "optimizer": "sgd", "momentum": 0.9,
    "lr": 0.2, "seed": 2, "rounds": 9, "run": "r",
}  # fmt: skip
STOPS_AFTER, BEST = 7, 4  # with patience 2; the index of the best round
PATIENCE: dict[str, object] = {"stop_when": "val_loss:patience=2"}


def rows_of(run: Path) -> list[dict[str, str]]:
    return read_summary((run / "rounds.csv").read_bytes())


def figures_of(run: Path) -> list[dict[str, str]]:
    """Return the lines of a run without what is measured."""
    return [{n: v for n, v in row.items() if "loss" in n or "acc" in n} for row in rows_of(run)]


def model_rounds(folder: Path) -> list[int]:
    names = {path.stem.rpartition("_")[2] for path in (folder / "models").glob("*.pt")}
    return sorted(-1 if name == "init" else int(name) for name in names)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has stopped early."""
    return simulated(tmp_path_factory.mktemp("stopped"), **RUN | PATIENCE | {"keep_tensors": "all"})


def test_a_run_that_stops_is_the_run_of_so_many_rounds(stopped: Path, tmp_path: Path) -> None:
    plain = simulated(tmp_path, **RUN | {"rounds": STOPS_AFTER})
    assert len(rows_of(stopped)) == STOPS_AFTER
    assert figures_of(stopped) == figures_of(plain)
    assert [bool(row["test_acc"]) for row in rows_of(stopped)] == [False] * 6 + [True]
    assert_equal(all_weights(stopped), all_weights(plain))
    assert len(read_predictions(stopped).labels) == len(read_predictions(plain).labels) > 0
    log = (stopped / "server_log.txt").read_text()
    assert "the run stops after round 7/9: val_loss has not become better than 0.33" in log
    assert "in round 5 for 2 rounds" in log
    assert "best round" not in log
    console = Console(width=300)
    with console.capture() as captured:
        console.print(frame(*Watched(stopped).look(), console))
    assert re.search(r"\[#+\] 100%\n7 of 9 rounds done; val_loss has not become", captured.get())


def test_replay_knows_which_rounds_there_are(stopped: Path) -> None:
    report = check(load(stopped))
    assert report.findings == []
    steps = len(list(stopped.glob("client_files/*/*/grads_*.pt")))
    assert report.summary == f"{steps} gradients checked, 0 differ"
    assert (report.models, report.dropped) == (2 * STOPS_AFTER, 0)


@pytest.mark.parametrize(
    ("text", "num_rounds"),
    [
        ("val_loss:patience=2,min_delta=0.1", 5),  # 0.378 and 0.332 are not so much less than 0.399
        ("val_acc:patience=2,min_delta=0.05", 5),
        ("train_loss:patience=1", 9),
    ],
)
def test_metric_and_least_change_decide(tmp_path: Path, text: str, num_rounds: int) -> None:
    run = simulated(tmp_path, **RUN | {"stop_when": text})
    assert len(rows_of(run)) == num_rounds


@pytest.mark.parametrize(
    ("options", "server_dies"),
    [
        ({"scheme": "sflv3", "optimizer_state": "keep"}, "average.after"),
        ({"scheme": "sl"}, "run.before_goodbye"),
        ({}, "validation.after"),
    ],
)
def test_a_run_over_sockets_stops_after_the_same_round(
    launcher: Launcher, tmp_path: Path, options: dict[str, object], server_dies: str
) -> None:
    """A client is killed in the test pass, and the server in the last round or after it."""
    own = RUN | PATIENCE | options | {"keep_models": "best", "keep_tensors": "none"}
    whole = simulated(tmp_path / "whole", **own)
    rounds = len(rows_of(whole))
    assert rounds < 9
    count = 1 if server_dies == "run.before_goodbye" else rounds
    server = launcher.server(*options_of(own), env={VARIABLE: f"{server_dies}:{count}"})
    first = launcher.client("--client-id", 0)
    dies = launcher.client("--client-id", 1, env={VARIABLE: f"validation.before:{rounds + 1}"})
    for program in (server, dies) if server_dies == "average.after" else (dies, server):
        was_killed(program)
        if program is dies:
            second = launcher.client("--client-id", 1)
        else:
            server = launcher.server("--resume", launcher.folder / "server/r")
    run = launcher.folder / "server/r"
    for program in (server, first, second):
        program.ended_with(0)
    assert figures_of(run) == figures_of(whole)
    assert_equal(all_weights(run), all_weights(whole), at_least=8)
    assert check(load(run)).findings == []
    line = launcher.server("--resume", run, "--rounds", 20).ended_with(2)
    assert f"has stopped after {rounds} rounds of its own accord: val_loss has not become" in line


@pytest.mark.slow
@pytest.mark.parametrize(("text", "best"), [("best", BEST), ("best:val_loss", BEST)])
def test_the_models_of_the_best_round_stay(tmp_path: Path, text: str, best: int) -> None:
    options = {"keep_models": text, "rounds": 8}
    run = simulated(tmp_path, **RUN | options)
    assert model_rounds(run) == [best, 6, 7]  # beside what the last two checkpoints start from
    whole = simulated(tmp_path / "whole", **RUN | {"rounds": best + 1})
    log = (run / "server_log.txt").read_text()
    said = r"best round: 5/8, val_loss 0\.33\d\d; its models are models/\*_004\.pt\n"
    assert re.search(said, log)
    name = f"models/server_model_{best:03d}.pt"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert check(load(run)).findings == []


def test_a_clients_own_models_of_the_best_round_stay(tmp_path: Path) -> None:
    run = simulated(tmp_path, **RUN | {"scheme": "sflv3", "keep_models": "best", "rounds": 9})
    losses = [float(row["val_loss"]) for row in rows_of(run)]
    best = losses.index(min(losses))
    assert best < 7, losses
    for folder in (run, tmp_path / "client/r/client_0", tmp_path / "client/r/client_1"):
        assert model_rounds(folder) == [best, 7, 8]


def test_the_best_round() -> None:
    def seen(values: list[float | None], **options: object) -> tuple[int, int]:
        best = BestRound("m", **{"falls": True} | options)  # type: ignore[arg-type]
        for index, value in enumerate(values):
            best.see(index, {} if value is None else {"m": value})
        return best.round, best.rounds_since

    assert seen([3, 2, 2, 2.5]) == (1, 2)  # the first of equal ones
    assert seen([3, 2, 4], falls=False) == (2, 0)
    assert seen([3, 2.5, 1.9], min_delta=1) == (2, 0)
    assert seen([3, None, 2.5, None], min_delta=1) == (0, 1)  # without the figure, none counts
    assert seen([math.nan, math.inf]) == (-1, 2)
    assert seen([2, math.nan, 1]) == (2, 0)


@pytest.mark.parametrize(
    "text", ["val_loss", "val_loss:5", "val_loss:patience=0", "val_loss:patience=2,min_delta=-1",
             "val_loss:patience=2,patience=3", ":patience=1", "x" * 99 + ":patience=1"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--stop-when .*: give METRIC:patience=N"):
        RunConfig(stop_when=text).check()


def test_what_no_round_can_tell_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    assert StopWhen.parse("val_acc:patience=3,min_delta=1e-3") == StopWhen("val_acc", 3, 1e-3)
    assert KeepModels.parse("best:val_acc").best_by == "val_acc"
    for options in ({"stop_when": "val_los:patience=1"}, {"keep_models": "best:val_los"}):
        with pytest.raises(ConfigError, match=r"unknown metric of --.* did you mean val_loss"):
            Recipe.of(RunConfig(**options))  # type: ignore[arg-type]
    for name in ("seconds", "test_acc"):  # not the same in each run; not known in each round
        with pytest.raises(ConfigError, match="unknown metric of --stop-when"):
            Recipe.of(RunConfig(stop_when=f"{name}:patience=1"))
    with pytest.raises(ConfigError, match="or best"):
        KeepModels.parse("best:")
    write_own(tmp_path / "client_0", count=4)
    own = RunConfig(partition="own", clients=1, model="mlp", **PATIENCE)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="--stop-when: no client has validation samples"):
        simulate(own, NodeConfig(out=str(tmp_path), data_dir=str(tmp_path)))
    split = {"topology": "u-shaped", "cut": "1,2", "model": "mlp", "clients": 2}
    for option in ({"stop_when": "val_macro_f1:patience=1"}, {"keep_models": "best:val_macro_f1"}):
        with pytest.raises(RunError, match=r"client_0 keeps its labels, .* that val_macro_f1"):
            simulate(RunConfig(**split | option), NodeConfig(out=str(tmp_path)))  # type: ignore[arg-type]
    apart = ["--role", "main", "--weights", f"dir:{tmp_path}", "--stop-when", "val_acc:patience=1"]
    line = launcher.server("--clients", 2, "--model", "mlp", *apart).ended_with(2)
    assert "a fed server apart sees no metrics, which --stop-when val_acc:patience=1 needs" in line
