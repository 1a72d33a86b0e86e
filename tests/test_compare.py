"""The comparison: what it runs, that it goes on where it stopped, and what it writes."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.costs import formula_bytes
from experiments.plan import Study, names, run_name
from sfl.config import NodeConfig, RunConfig
from sfl.split_model import SplitModel
from tests.test_demo import ROOT, run

COMMON = ("--model", "mlp", "--rounds", "3", "--batch-size", "64")
FILES = {
    "compare.csv", "times.csv", "compare.md", "rounds.png", "bytes.png", "flops.png", "final.png",
    "clients_0.png", "clients_1.png",
}  # fmt: skip


def compare(out: Path, *options: object, code: int = 0) -> str:
    done = run("-m", "experiments.compare", *COMMON, "--out", out, *options, code=code)
    return done.stdout + done.stderr


def started(out: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "experiments.compare", *COMMON, "--out", str(out), *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


CELLS = (
    "--schemes", "central,sl", "--partitions", "iid,sizes:0.2,0.2,0.6", "--seeds", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    compare(out, *CELLS, "--jobs", 2)
    return out


@pytest.mark.slow
def test_every_combination_is_in_the_tables(whole: Path) -> None:
    assert {path.name for path in whole.iterdir() if path.is_file()} == FILES
    lines = pd.read_csv(whole / "compare.csv", dtype={"client": str})
    assert len(lines) == 2 * 2 * 3 * (2 + 4)  # central has one client
    cells = {tuple(cell) for cell in lines[["partition", "scheme", "seed"]].to_numpy().tolist()}
    assert len(cells) == 8
    overall = lines[lines["client"] == "all"]
    last = overall[overall["round"] == 2]
    assert last["test_acc"].notna().all()
    assert overall[overall["round"] < 2]["test_acc"].isna().all()
    assert (overall["val_balanced_acc"].between(0, 1)).all()
    of_clients = lines[(lines["client"] != "all") & (lines["round"] == 1)]
    samples = of_clients[of_clients["partition"] != "iid"].groupby("client")["samples"].unique()
    assert sorted(samples["2"].tolist())[0] == 1920


@pytest.mark.slow
def test_the_table_is_what_the_runs_say(whole: Path) -> None:
    text = (whole / "compare.md").read_text()
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| iid | sl |")]
    with open(whole / "compare.csv", newline="") as stream:
        lines = [
            line
            for line in csv.DictReader(stream)
            if (line["partition"], line["scheme"], line["client"], line["round"])
            == ("iid", "sl", "all", "2")
        ]
    accuracies = [float(line["test_acc"]) for line in lines]
    mean, spread = sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5
    assert rows[0][2] == f"{mean:.4f} ± {spread:.4f}"
    logs = [(whole / f"server/sl-iid-{seed}/rounds.csv").read_text() for seed in (0, 1)]
    recorded = [float(list(csv.DictReader(log.splitlines()))[-1]["test_acc"]) for log in logs]
    assert recorded == accuracies


@pytest.mark.slow
def test_a_comparison_that_was_broken_off_goes_on_and_gives_the_same_csv(
    whole: Path, tmp_path: Path
) -> None:
    process = started(tmp_path, *CELLS)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("sl-iid-0: round 2/3"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1, err
    assert not (tmp_path / "compare.csv").exists()
    of_first = (tmp_path / "server/central-iid-0/rounds.csv").stat().st_mtime_ns
    assert not (tmp_path / "server/central-iid-1").exists()
    said = compare(tmp_path, *CELLS, "--jobs", 2)
    assert "central-iid-0: round" not in said
    assert "sl-iid-0: round 1/3" in said
    assert (tmp_path / "server/central-iid-0/rounds.csv").stat().st_mtime_ns == of_first
    assert (tmp_path / "compare.csv").read_bytes() == (whole / "compare.csv").read_bytes()
    again = compare(tmp_path, *CELLS)
    assert "round 1/3" not in again


@pytest.mark.slow
def test_over_sockets_the_csv_is_that_of_the_simulation(tmp_path: Path) -> None:
    cells = ("--schemes", "sflv2")
    for over in ("sockets", "simulation"):
        compare(tmp_path / over, *cells, "--over", over)
    ours, theirs = (
        (tmp_path / over / "compare.csv").read_bytes() for over in ("sockets", "simulation")
    )
    assert ours == theirs


def test_runs_that_cannot_be_or_that_differ_are_one_line(tmp_path: Path) -> None:
    assert "unknown scheme 'sflv9'" in compare(tmp_path, "--schemes", "sl,sflv9", code=2)
    assert "names 2 shares" in compare(tmp_path, "--partitions", "sizes:0.5,0.5", code=2)
    assert "must be at least 1" in compare(tmp_path, "--seeds", 0, code=2)
    assert "--foo" in compare(tmp_path, "--foo", code=2)
    compare(tmp_path, "--schemes", "fl", "--seed", 7)
    assert [path.name for path in (tmp_path / "server").iterdir()] == ["fl-iid-7"]
    said = compare(tmp_path, "--schemes", "fl", "--seed", 7, "--lr", 0.5, code=2)
    assert "holds a run with --lr 0.001, not 0.5: give another --out" in said
    assert not list(tmp_path.glob("*.err"))


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    cells = ("--schemes", "fl", "--partitions", "shards:1000,iid", "--clients", 5)
    said = compare(tmp_path, *cells, code=1)
    assert "fl-shards-1000-0: simulate: error: --partition shards:1000: 5000 shards of 4000" in said
    assert (tmp_path / "server/fl-iid-0/rounds.csv").exists()


def test_names_keep_their_numbers() -> None:
    assert names("iid,sizes:0.2,0.2,0.6,dirichlet:0.1,shards:2") == [
        "iid", "sizes:0.2,0.2,0.6", "dirichlet:0.1", "shards:2",
    ]  # fmt: skip
    study = Study(["sl", "fl"], ["iid", "shards:2"], [3, 4], RunConfig(), NodeConfig(), "sockets")
    assert len({cell.run for cell in study.runs}) == 8
    for cell in study.runs:
        cell.check()
    assert run_name("sl", "sizes:0.2,0.2,0.6", 3) == "sl-sizes-0.2-0.2-0.6-3"


@pytest.mark.parametrize(
    ("scheme", "smashed", "weights"),
    [
        ("fl", 0, 2 * 4 * 109386),
        ("sl", 2 * 70 * 128 * 4, 2 * 4 * 100480),
        ("sflv1", 2 * 70 * 128 * 4, 2 * 4 * 100480),
        ("sflv3", 2 * 70 * 128 * 4, 0),
        ("sync-sgd", 0, 2 * 4 * 109386 * 5),
        ("central", 0, 0),
    ],
)
def test_the_formulas_of_splitfed(scheme: str, smashed: int, weights: int) -> None:
    config = RunConfig(scheme=scheme, model="mlp")
    split = SplitModel(config, (1, 28, 28), 10)
    assert formula_bytes(config, split, samples=70, num_steps=5) == (smashed, weights)
