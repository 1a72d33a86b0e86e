"""Trackers hold every figure of a run, go on with a resumed one, and cannot disturb it."""

import importlib.util
import io
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

import sfl
from sfl.archive.round_log import read_summary
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.runtime.local_network import Away
from sfl.runtime.simulation import simulate
from sfl.tracking import pictures, tracking
from sfl.tracking.tracked import TrackedRound, TrackedRun, Tracker
from sfl.tracking.trackers import trackers_of
from sfl.tracking.tracking import Tracking
from sfl.tracking.weights_and_biases import WeightsAndBiases
from tests.support.launch import Launcher
from tests.support.runs import go_on
from tests.support.tracked import (
    curves_of_files,
    curves_of_table,
    curves_of_wandb,
    events_of,
    records_of,
    rows_of_wandb,
)
from tests.support.weights import all_weights, assert_equal

RUN = RunConfig(
    model="mlp", rounds=3, clients=2, batch_size=400, run="r", partition="sizes:0.3,0.7"
)
STEPS = 6  # of the larger client's 2240 training samples in a round


def simulated(out: Path, trackers: Mapping[str, Tracker]) -> Path:
    return simulate(RUN, NodeConfig(out=str(out)), [Away(0, 1, back=2)], trackers=trackers)


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine on which nobody has ever used W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody" / name))


@pytest.mark.slow
@pytest.mark.usefixtures("no_account")
def test_trackers_hold_every_figure(tmp_path: Path) -> None:
    trackers = trackers_of("tensorboard:histograms=2,csv,wandb:project=p,histograms=3")
    run = simulated(tmp_path, trackers)
    wanted = curves_of_files(run, STEPS)
    assert ("round/val_acc", 2) in wanted
    assert ("step/client_1/loss", 17) in wanted
    assert curves_of_table(run / "tracked/figures.csv", STEPS) == wanted

    events = events_of(run / "tracked/tensorboard")
    assert events.numbers == wanted
    assert events.texts["round/took_part/text_summary", 1] == "1"
    assert events.texts["round/missing/text_summary", 1].startswith("client_0: ")
    assert "| batch_size | 400 |" in events.texts["config/text_summary", 0]
    assert {at for _, at in events.histograms} == {1}
    assert {("weights/back/fc2.bias", 1), ("weights/front/fc1.weight", 1)} <= events.histograms

    assert events.pictures.keys() == {("round/confusion", 2)}  # the one that is tested
    assert Image.open(io.BytesIO(events.pictures["round/confusion", 2])).size > (500, 500)

    log = (run / "server_log.txt").read_text()
    assert "--track wandb: offline (there is no key of W&B); upload with: wandb sync" in log
    (path,) = run.glob("tracked/wandb/*/wandb/offline-run-*-r/run-r.wandb")
    assert curves_of_wandb(path) == wanted
    (picture,) = path.parent.glob("files/media/images/round/confusion_*.png")
    assert Image.open(io.BytesIO(picture.read_bytes())).size > (500, 500)
    rows = list(rows_of_wandb(path))
    with_weights = [row for row in rows if any(name.startswith("weights/") for name in row)]
    assert [row["round"] for row in with_weights] == [2]
    (config,) = (r.run for r in records_of(path) if r.WhichOneof("record_type") == "run")
    assert (config.project, config.run_id) == ("p", "r")
    assert {c.key: c.value_json for c in config.config.update}["batch_size"] == "400"
    assert any(path.is_symlink() for path in run.glob("tracked/wandb/**/*"))  # as W&B does
    assert sfl.open_run(run).last_round() == 2

    plain = simulated(tmp_path / "plain", {})
    assert_equal(all_weights(run), all_weights(plain))
    assert not (plain / "tracked").exists()


def test_a_tracker_is_given_the_confusion_matrix_of_the_test_set(tmp_path: Path) -> None:
    kept = Keeping()
    run = simulate(RUN, NodeConfig(out=str(tmp_path)), trackers={"mine": kept})
    wanted = np.zeros((10, 10), int)
    for client in range(2):
        found = sfl.open_run(run).predictions(client)
        wanted += confusion_matrix(found["labels"], found["logits"].argmax(1), labels=range(10))
    *earlier, last = kept.rounds
    assert [done.confusion for done in earlier] == [None, None]
    assert last.confusion is not None
    assert last.confusion.tolist() == wanted.tolist()
    assert last.confusion.trace() / last.confusion.sum() == pytest.approx(last.overall["test_acc"])
    assert kept.classes == [str(i) for i in range(10)]


def test_names_of_classes_disturb_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what looks like mathematics, nor what no font has, nor a picture that fails."""
    names, said = (r"cats $x_{$", "a\udc80b", "猫", "\x1b\n"), list[str]()
    run = TrackedRun("r", tmp_path, {}, 1, 0, is_resumed=False, classes=names, say=said.append)
    done = TrackedRound(0, {"val_acc": 0.5}, {}, {}, {}, confusion=torch.eye(4, dtype=torch.int64))
    (tracker,) = trackers_of("tensorboard").values()
    tracker.start(run)
    tracker.add(done)
    monkeypatch.setattr(pictures, "DPI", -1)
    tracker.add(replace(done, index=1))
    tracker.end({}, failed=False)
    events = events_of(tmp_path / "tensorboard")
    assert events.pictures.keys() == {("round/confusion", 0)}
    assert events.numbers.keys() == {("round/val_acc", 0), ("round/val_acc", 1)}
    assert [line[:60] for line in said] == [
        "warning: --track: no picture of the test set after round 2: "
    ]


def of_round(index: int, value: float) -> TrackedRound:
    steps = {0: [{"loss": value}] * 2, 1: [{"loss": value}]}
    return TrackedRound(index, {"val_acc": value}, {}, {0: {"val_acc": value}}, steps)


@pytest.mark.usefixtures("no_account")
def test_what_a_resumed_run_does_again_replaces_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FAILED_END_S", 60.0)
    said: list[str] = []
    for first, value in ((0, 1.0), (1, 2.0)):
        time.sleep(1 - time.time() % 1)  # the libraries name their files by the second
        run = TrackedRun("r", tmp_path, {"lr": 0.1}, 2, first, is_resumed=first > 0)
        told = Tracking(trackers_of("tensorboard,csv,wandb"), run, said.append)
        told.start()
        for index in range(first, 3):
            told.add(lambda i=index, v=value: of_round(i, v), {})
        told.end({"val_acc": value}, failed=first == 0)
    assert [line for line in said if "warning" in line] == []
    whose = {"round/val_acc", "client_0/val_acc"}
    wanted = {(name, i): 2.0 if i else 1.0 for name in whose for i in range(3)}
    wanted |= {("step/client_0/loss", i): 2.0 if i > 1 else 1.0 for i in range(6)}
    wanted |= {("step/client_1/loss", i): 2.0 if i > 1 else 1.0 for i in range(0, 6, 2)}
    assert curves_of_table(tmp_path / "figures.csv", 2) == wanted
    assert events_of(tmp_path / "tensorboard").numbers == wanted
    parts = sorted(tmp_path.glob("wandb/*/wandb/offline-run-*-r/run-r.wandb"))
    assert len(parts) == 2  # of one id
    assert {**curves_of_wandb(parts[0]), **curves_of_wandb(parts[1])} == wanted


@pytest.mark.usefixtures("no_account")
def test_a_resumed_run_goes_on_in_the_same_curves(launcher: Launcher) -> None:
    track = ["--track", "tensorboard,csv,wandb"]
    options = ["--model", "mlp", "--batch-size", 400, "--rounds", 2, "--test-every", 1, *track]
    run = launcher.run(*options)
    assert f"--track csv: every figure goes into {run}" in (run / "server_log.txt").read_text()
    assert go_on(launcher, "--rounds", 3) == run  # --track is in the run's config.json
    wanted = curves_of_files(run, steps := 3)
    assert {("round/test_acc", n) for n in range(3)} <= wanted.keys()
    assert ("step/client_2/loss", 8) in wanted
    assert curves_of_table(run / "tracked/figures.csv", steps) == wanted
    assert events_of(run / "tracked/tensorboard").numbers == wanted
    first, second = sorted(run.glob("tracked/wandb/*/wandb/offline-run-*/run-*.wandb"))
    assert {**curves_of_wandb(first), **curves_of_wandb(second)} == wanted


class Failing:
    package = ""
    histograms = 0

    def __init__(self, where: str) -> None:
        self.where = where

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise OSError(28, "No space left on device", "curves")

    def start(self, run: TrackedRun) -> str:
        self._fail("start")
        return "here"

    def add(self, done: TrackedRound) -> None:
        self._fail("add")

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._fail("end")


class Keeping(Failing):
    def __init__(self) -> None:
        super().__init__("nowhere")
        self.rounds: list[TrackedRound] = []
        self.classes: list[str] = []

    def start(self, run: TrackedRun) -> str:
        self.classes += run.classes
        return "here"

    def add(self, done: TrackedRound) -> None:
        self.rounds.append(done)


class Hanging(Failing):
    def add(self, done: TrackedRound) -> None:
        threading.Event().wait()


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        (Failing("start"), "curves: No space left on device"),
        (Failing("add"), "curves: No space left on device"),
        (Failing("end"), "curves: No space left on device"),
        (Hanging(""), "it takes too long to end"),
    ],
)
def test_a_tracker_that_fails_warns_once_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Tracker, said: str
) -> None:
    monkeypatch.setattr(tracking, "END_S", 60.0 if said.startswith("curves") else 2.0)
    run = simulated(tmp_path, {"mine": tracker, **trackers_of("csv")})
    lines = (run / "server_log.txt").read_text().splitlines()
    warnings = [line for line in lines if "warning: --track" in line]
    assert [line.partition("warning: ")[2] for line in warnings] == [
        f"--track mine: {said}; going on without it"
    ]
    assert len(read_summary((run / "rounds.csv").read_bytes())) == 3
    assert lines[-1].endswith(f"the run lies in {run}")
    wanted = curves_of_files(run, STEPS)
    assert curves_of_table(run / "tracked/figures.csv", STEPS) == wanted


def test_a_tracker_that_does_not_keep_up_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MOST_WAITING", 1)
    said: list[str] = []
    run = TrackedRun("r", tmp_path, {}, 1, 0, is_resumed=False)
    slow = Tracking({"slow": Hanging("")}, run, said.append)
    slow.start()
    for index in range(4):
        slow.add(lambda i=index: of_round(i, 1.0), {})
    assert "warning: --track slow: it does not keep up; going on without it" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "unknown track 'tensorbord'; did you mean tensorboard"),
        ("csv,,", "unknown track ''"),
        ("tensorboard:histograms=-1", "histograms=-1: must be 0 or more"),
        ("csv:histograms=1", "csv has no option 'histograms'; it has none"),
        ("wandb:project=p,histograms=x", "histograms must be of type int"),
        ("csv,wandb,csv", "csv is named twice"),
    ],
)
def test_what_cannot_be_tracked_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trackers_of(text)


def test_a_missing_library_is_one_line_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"wandb is not installed; install it: .* pip install wan"
    ):
        trackers_of("csv,wandb")
    assert list(trackers_of("csv")) == ["csv"]


def test_a_users_mode_of_wandb_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WeightsAndBiases()
    assert "offline" not in tracker.start(TrackedRun("r", tmp_path, {}, 1, 0, is_resumed=False))
    tracker.add(of_round(0, 1.0))
    tracker.end({}, failed=False)
    assert not list(tmp_path.glob("**/*.wandb"))


OPTIONS = ["--model", "mlp", "--rounds", "1", "--clients", "1", "--batch-size", "500", "--run", "r"]
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("track", ["csv", "nothing"])
def test_nothing_is_imported_that_is_not_asked_for(tmp_path: Path, track: str) -> None:
    hidden = "import sys, runpy; sys.modules['tensorboard'] = sys.modules['wandb'] = None; "
    run = "runpy.run_module('experiments.simulate', run_name='__main__', alter_sys=True)"
    argv = [*OPTIONS, "--out", str(tmp_path), "--track", track]
    done = subprocess.run(
        [sys.executable, "-c", hidden + run, *argv], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    if track == "nothing":
        assert done.returncode == 2
        assert done.stderr.startswith("simulate: error: unknown track 'nothing'; there are csv")
        assert not list(tmp_path.iterdir())
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "server/r/tracked/figures.csv").exists()
