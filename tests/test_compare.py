"""The comparison: what it runs, that it goes on where it stopped, and what it writes."""

import csv
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes

from experiments.compare import plan
from experiments.compare.__main__ import main, parse_sweep
from experiments.compare.figures import draw_all, looks
from experiments.compare.results import markdown, read_study
from experiments.compare.study import NO_CUT, Study, left_out, run_name
from experiments.compare.values import names
from experiments.support.costs import formula_bytes
from sfl.config import RunConfig
from sfl.errors import ConfigError, RunError, SflError
from sfl.nodes import NodeConfig
from sfl.runtime.simulation import simulate
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from tests.support.programs import ROOT, run_program

COMMON = ("--model", "mlp", "--rounds", "3", "--batch-size", "64")
FILES = {
    "compare.csv", "times.csv", "compare.md", "rounds.png", "bytes.png", "flops.png", "final.png",
    "clients_0.png", "clients_1.png", "report.html",
}  # fmt: skip


def compare(out: Path, *options: object, code: int = 0) -> str:
    done = run_program("-m", "experiments.compare", *COMMON, "--out", out, *options, code=code)
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
    assert rows[0][5] == f"{mean:.4f} ± {spread:.4f}"
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
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert len(err.splitlines()) == 1, err
    assert not (tmp_path / "compare.csv").exists()
    of_first = (tmp_path / "server/central-iid-0/rounds.csv").stat().st_mtime_ns
    said = compare(tmp_path, *CELLS, "--jobs", 2)
    assert "central-iid-0: round" not in said
    assert "sl-sizes-0.2-0.2-0.6-1: round 1/3" in said  # the last of all
    assert (tmp_path / "server/central-iid-0/rounds.csv").stat().st_mtime_ns == of_first
    assert (tmp_path / "compare.csv").read_bytes() == (whole / "compare.csv").read_bytes()
    again = compare(tmp_path, *CELLS)
    assert "round 1/3" not in again


@pytest.mark.slow
def test_over_sockets_the_csv_is_that_of_the_simulation(tmp_path: Path) -> None:
    cells = ("--schemes", "sflv2", "--over")
    # Broken off while the server waits for its clients: nothing is left running, or in the way.
    process = started(tmp_path / "sockets", *cells, "sockets")
    while not (tmp_path / "sockets/server/sflv2-iid-0").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3
    for over in ("sockets", "simulation"):
        compare(tmp_path / over, *cells, over)
    ours, theirs = (
        (tmp_path / over / "compare.csv").read_bytes() for over in ("sockets", "simulation")
    )
    assert ours == theirs
    said = compare(tmp_path / "sockets", *cells, "simulation", code=2)
    assert "holds a run with --over sockets: give another --out" in said


def study_of(tmp_path: Path, **options: object) -> tuple[Study, pd.DataFrame]:
    """Carry out a study in this process, and return it with its lines."""
    config = RunConfig(rounds=2, keep_tensors="none", **options)  # type: ignore[arg-type]
    node = NodeConfig(out=str(tmp_path))
    study = Study([config.scheme], [config.partition], [0], config, node, "simulation")
    (cell,) = study.runs
    simulate(cell, node)
    return study, read_study(study)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "model", "batch_size", "cut"),
    [
        ("sflv2", "lenet5", 64, None),
        ("sl", "lenet5", 64, None),
        ("sl", "lenet5", 64, "3,9"),
        ("sl", "lenet5", 64, "3,6,9"),
        ("fl", "lenet5", 64, None),
        ("sync-sgd", "mlp", 24, None),
    ],
)
def test_measured_bytes_are_within_five_percent_of_the_formula(
    tmp_path: Path, scheme: str, model: str, batch_size: int, cut: str | None
) -> None:
    study, lines = study_of(tmp_path, scheme=scheme, model=model, batch_size=batch_size, cut=cut)
    table = markdown(study, lines).partition("## Measured bytes")[2]
    (row,) = [row for row in table.splitlines() if row.startswith(f"| iid | {scheme} |")]
    cells = [cell.strip(" %") for cell in row.split("|")[6:-1]]
    formula, measured, percent, *parts = map(float, cells)
    assert 0 < percent < 5
    assert abs(measured / formula - 1 - percent / 100) < 1e-3
    assert abs(sum(parts) - (measured - formula)) < 0.003
    assert all(part >= -0.001 for part in parts)


def test_figures_of_clients_are_weighted_and_counted(tmp_path: Path) -> None:
    _, lines = study_of(tmp_path, scheme="sflv1", model="mlp", clients=1, batch_size=1000)
    of_client, overall = (lines[lines["client"] == who].reset_index() for who in ("0", "all"))
    assert of_client["samples"].tolist() == [3200, 3200]  # batches of 1000, 1000, 1000 and 200
    for metric in ("train_loss", "train_acc"):
        assert abs(of_client[metric] - overall[metric]).max() < 1e-12
    assert of_client["client_gflops"][0] == pytest.approx(3200 * 4 * 784 * 128 / 1e9)


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_pictures_of_few_and_of_many(tmp_path: Path, many: bool) -> None:
    options = {"clients": 12, "participation": 0.3} if many else {"clients": 1}
    study, lines = study_of(tmp_path, scheme="sflv3" if many else "fl", model="mlp", **options)
    for path in draw_all(study, lines):
        assert path.stat().st_size > 5000
    assert ("lowest | mean | highest" in markdown(study, lines)) == many


def test_costs_are_of_training_and_gaps_are_to_central(tmp_path: Path) -> None:
    config = RunConfig(rounds=2, model="mlp", keep_tensors="none", batch_size=64)
    node = NodeConfig(out=str(tmp_path))
    study = Study(["central", "sl"], ["iid"], [0], config, node, "simulation")
    for cell in study.runs:
        simulate(cell, node)
    lines = read_study(study)
    accuracy, _, costs, _ = re.split("^## .*$", markdown(study, lines), flags=re.MULTILINE)[1:]
    last = lines[(lines["client"] == "all") & (lines["round"] == 1)].set_index("scheme")["test_acc"]
    (row,) = [row for row in accuracy.splitlines() if row.startswith("| iid | sl |")]
    assert row.endswith(f"| {last['sl'] - last['central']:.4f} |")
    (row,) = [row for row in costs.splitlines() if row.startswith("| iid | sl |")]
    of_clients = lines[(lines["scheme"] == "sl") & (lines["client"] != "all")]
    kinds = ("labels", "activations", "weights", "control")
    up = sum(of_clients[f"bytes_up_{kind}"].mean() for kind in kinds) / 1e6
    assert row.split(" | ")[6] == f"{up:.2f}"
    (row,) = [row for row in costs.splitlines() if row.startswith("| iid | central |")]
    assert row.split(" | ")[6:9] == ["-", "-", "-"]


@pytest.mark.slow
def test_runs_of_other_lengths_and_other_numbers_of_clients(tmp_path: Path) -> None:
    config = RunConfig(rounds=3, model="mlp", batch_size=400, keep_tensors="none", clients=2)
    node = NodeConfig(out=str(tmp_path))
    sweeps = {"stop_when": ["", "val_loss:patience=1,min_delta=9"], "clients": [2, 3]}
    study = Study(["fl"], ["iid"], [0], config, node, "simulation", sweeps=sweeps)
    for run in study.runs:
        simulate(run, node)
    lines = read_study(study)
    rows = [row.split(" | ") for row in markdown(study, lines).splitlines() if "| fl |" in row]
    assert rows[4][-1] == "- |"  # client 2, where there are two
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "bar", lambda self, *given, label, **how: drawn.append(label))
        draw_all(study, lines)
    assert len(set(drawn)) == 4  # those that ended earlier, too


@pytest.mark.slow
def test_central_alone_has_no_clients(tmp_path: Path) -> None:
    study, lines = study_of(tmp_path, scheme="central", model="mlp")
    assert [path.name for path in draw_all(study, lines)] == ["rounds.png", "final.png"]
    assert lines["bytes_up"].isna().all()
    whole = 3202 * (4 * 784 * 128 + 6 * (128 * 64 + 64 * 10)) / 1e9
    assert lines["client_gflops"].tolist() == pytest.approx([whole] * 4)


@pytest.mark.slow
def test_runs_that_cannot_be_or_that_differ_are_one_line(tmp_path: Path) -> None:
    assert "unknown scheme 'sflv9'" in compare(tmp_path, "--schemes", "sl,sflv9", code=2)
    assert "names 2 shares" in compare(tmp_path, "--partitions", "sizes:0.5,0.5", code=2)
    assert "must be at least 1" in compare(tmp_path, "--seeds", 0, code=2)
    assert "--foo" in compare(tmp_path, "--foo", code=2)
    assert "a comparison has many; give --schemes" in compare(tmp_path, "--scheme", "sl", code=2)
    compare(tmp_path, "--schemes", "fl", "--seed", 7)
    assert [path.name for path in (tmp_path / "server").iterdir()] == ["fl-iid-7"]
    said = compare(tmp_path, "--schemes", "fl", "--seed", 7, "--lr", 0.5, code=2)
    assert "holds a run with --lr 0.001: give another --out" in said
    assert not list(tmp_path.glob("*.err"))


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    cells = ("--schemes", "fl", "--partitions", "shards:1000,iid", "--clients", 5)
    said = compare(tmp_path, *cells, code=1)
    assert "fl-shards-1000-0: simulate: error: --partition shards:1000: 5000 shards of 4000" in said
    assert (tmp_path / "server/fl-iid-0/rounds.csv").exists()


def test_names_keep_their_numbers() -> None:
    assert names("--partitions", "iid,sizes:0.2,0.2,0.6, dirichlet:0.1,shards:2") == [
        "iid", "sizes:0.2,0.2,0.6", "dirichlet:0.1", "shards:2",
    ]  # fmt: skip
    study = Study(["sl", "fl"], ["iid", "shards:2"], [3, 4], RunConfig(), NodeConfig(), "sockets")
    assert len({cell.run for cell in study.runs}) == 8
    for cell in study.runs:
        cell.check()
    assert run_name("sl", "sizes:0.2,0.2,0.6", 3) == "sl-sizes-0.2-0.2-0.6-3"
    long = "sizes:" + ",".join(["0.05"] * 20)
    others = [(long, 0), (long, 1), (long.replace("0.05,0.05", "0.04,0.06", 1), 0)]
    others.append((long[:-9] + "0.04,0.06", 0))
    assert len({run_name("sl", partition, seed) for partition, seed in others}) == 4
    assert all(len(run_name("sync-sgd", p, 2**40)) <= 64 for p, _ in others)
    with pytest.raises(ConfigError, match="--schemes: fl is there twice"):
        names("--schemes", "fl,sl,fl")


def placed(schemes: list[str], cuts: list[str], *topologies: str, **options: Any) -> Study:
    """Return a study of several topologies or cuts."""
    run = RunConfig(model="lenet5", **options)
    where = {"topologies": topologies, "cuts": cuts}
    return Study(schemes, ["iid"], [0, 1], run, NodeConfig(), "simulation", **where)


def test_topologies_are_run_with_the_cuts_that_fit() -> None:
    study = placed(["fl", "sl", "central"], ["3", "3,9"], "vanilla", "u-shaped", "alternating")
    assert list(study.cells) == [
        ("iid", "fl", "-", "-", "-"),
        ("iid", "sl", "vanilla", "3", "-"),
        ("iid", "sl", "u-shaped", "3,9", "-"),
        ("iid", "sl", "alternating", "3", "-"),
        ("iid", "sl", "alternating", "3,9", "-"),
        ("iid", "central", "-", "-", "-"),
    ]
    assert left_out(study) == [
        "left out, 3 combinations: --topology vanilla takes 1 cut; --cut 3,9 has 2",
        "left out, 3 combinations: --topology u-shaped takes 2 cuts; --cut 3 has 1",
    ]
    assert [run.run for run in study.runs[:3]] == [
        "fl-iid-0", "sl-iid-vanilla-3-0", "sl-iid-u-shaped-3-9-0",
    ]  # fmt: skip
    assert len({run.run for run in study.runs}) == 12
    for run in study.runs:
        run.check()
    of_cuts = placed(["sl"], ["3", "3,9", "3,6,9"])
    assert [cell.topology for cell in of_cuts.cells] == ["vanilla", "u-shaped", "alternating"]
    assert left_out(of_cuts) == []


def test_a_single_topology_has_the_names_that_it_always_had() -> None:
    study = placed(["sl"], [], cut="3,9")
    assert list(study.cells) == [("iid", "sl", "u-shaped", "3,9", "-")]
    assert [run.run for run in study.runs] == ["sl-iid-0", "sl-iid-1"]


@pytest.mark.parametrize(
    ("cuts", "topologies", "message"),
    [
        (["3"], ["vanilla", "u-shaped"], "--topology u-shaped takes 2 cuts; --cut 3 has 1"),
        (["3", "3,9"], ["vanilla"], "--topology vanilla takes 1 cut; --cut 3,9 has 2"),
        (["3", "9,3"], [], "--cut 9,3: give numbers of blocks that rise"),
        (["3"], ["vanila"], "unknown topology 'vanila'; did you mean vanilla"),
    ],
)
def test_a_topology_or_cut_that_fits_nothing_is_refused(
    cuts: list[str], topologies: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        left_out(placed(["fl", "sl"], cuts, *topologies))


def test_whatever_is_drawn_together_can_be_told_apart() -> None:
    """The first of each scheme as in a study of one topology."""
    study = placed(["central", "fl", "sl", "sflv1", "sflv2"], ["3", "3,9", "3,6,9"])
    drawn = {cell[1:]: look for cell, look in looks(study).items()}
    assert len(drawn) == 11
    for what in ("label", "style", "bar"):
        assert len({str(getattr(look, what)) for look in drawn.values()}) == 11, what
    alone = looks(placed(["central", "fl", "sl", "sflv1", "sflv2"], []))
    assert [look.label for look in alone.values()] == ["central", "fl", "sl", "sflv1", "sflv2"]
    for cell, look in alone.items():
        key = cell[1:] if cell.cut == NO_CUT else (cell.scheme, "vanilla", "3", "-")
        assert drawn[key].style == look.style


@pytest.mark.slow
def test_several_topologies_are_in_the_tables_with_their_bytes(tmp_path: Path) -> None:
    options = ("--schemes", "fl,sl", "--cuts", "3", "3,5", "--rounds", 1, "--jobs", 2)
    said = compare(tmp_path, *options, "--topologies", "vanilla,u-shaped")
    assert said.count("left out") == 2
    lines = pd.read_csv(tmp_path / "compare.csv", dtype={"client": str})
    lines = lines[lines["client"] == "0"].set_index(["scheme", "topology", "cut"])
    assert sorted(lines.index) == [
        ("fl", "-", "-"),
        ("sl", "u-shaped", "3,5"),
        ("sl", "vanilla", "3"),
    ]
    one, two = lines.loc["sl", "vanilla", "3"], lines.loc["sl", "u-shaped", "3,5"]
    assert (two["bytes_up_labels"], one["bytes_up_labels"] > 0) == (0, True)
    samples = one["samples"]
    assert one["formula_smashed_bytes"] == 2 * samples * 128 * 4
    assert two["formula_smashed_bytes"] == 2 * samples * (128 + 64) * 4
    assert two["bytes_down_activations_1"] > samples * 64 * 4
    assert pd.isna(one["bytes_down_activations_1"])
    flops = 4 * 784 * 128, 6 * 64 * 10
    assert one["client_gflops"] == samples * flops[0] / 1e9
    assert two["client_gflops"] == samples * sum(flops) / 1e9
    assert "\n| iid | sl | u-shaped | 3,5 | - | 0." in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "bytes.png").stat().st_size > 5000
    said = compare(tmp_path, *options, "--cut", 3, code=2)
    assert "--cut: a comparison has many; give --cuts" in said


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
    split = SplitModel(Recipe.of(config), (1, 28, 28), 10)
    assert formula_bytes(config, split, samples=70, num_steps=5) == (smashed, weights)


def test_any_option_is_swept() -> None:
    """Values are those that the option itself would have."""
    assert parse_sweep("lr=0.1, 1e-3", []) == ("lr", [0.1, 0.001])
    assert parse_sweep("--batch-size=16,64", []) == ("batch_size", [16, 64])
    assert parse_sweep("partition=iid,sizes:0.2,0.2,0.6", []) == (
        "partition", ["iid", "sizes:0.2,0.2,0.6"],
    )  # fmt: skip
    assert parse_sweep("augment=,flip", [])[1] == ["", "flip"]
    values = dict([parse_sweep("lr=0.1,0.001", []), parse_sweep("model=mlp,lenet5", [])])
    study = Study(
        ["central", "sl"], ["iid"], [0], RunConfig(), NodeConfig(), "simulation", sweeps=values
    )
    assert len(study.runs) == len({run.run for run in study.runs}) == 8
    assert {(run.lr, run.model) for run in study.runs} == {
        (lr, model) for lr in (0.1, 0.001) for model in ("mlp", "lenet5")
    }
    drawn = looks(study)
    assert len({look.label for look in drawn.values()}) == 8
    assert "sl, vanilla 3, lr 0.1, model mlp" in {look.label for look in drawn.values()}
    here, same = study.in_own_folder(), study.in_own_folder()
    assert here.node.out_path == same.node.out_path
    other = Study(["sl"], ["iid"], [0], RunConfig(), NodeConfig(), "simulation").in_own_folder()
    assert other.node.out_path != here.node.out_path
    assert other.node.out_path.parent == Path("shared_files/compare")
    on_cuda = replace(study, node=NodeConfig(device="cuda")).in_own_folder()
    assert on_cuda.node.out_path != here.node.out_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr=1,2", "did you mean --lr"),
        ("lr=fast", "invalid float value"),
        ("lr=-1", "must be a number above 0"),
        ("lr", "give an option and its values"),
        ("seed=1,2", "--sweep seed: give --seeds"),
        ("threads=1,2", "is an option of a machine"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sweep(text, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "shared_files"), r"^\S*/shared_files$"),  # also if it is the default
        ((), r"^\S*/shared_files/compare/lenet5-mnist-5k-\w{8}$"),
        (("--sweep", "scheme=fl,sl"), r"scheme: --schemes has its values already; give one"),
        (("--scheme", "fl"), r"--scheme: a comparison has many; give --schemes"),
        (("--partition", "shards:2"), r"--partition: a comparison has many; give --partitions"),
    ],
)
def test_what_is_typed_counts(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(study: Study) -> None:
        raise RunError(str(study.node.out_path))

    monkeypatch.setattr(plan, "check_all", started)
    monkeypatch.setattr(sys, "argv", ["compare", "--schemes", "sl", *options])
    with pytest.raises(SflError, match=message):
        main()


@pytest.mark.slow
def test_a_sweep_ends_in_a_report(tmp_path: Path) -> None:
    cells = ("--schemes", "sl", "--sweep", "cut=1,3", "--rounds", "1", "--batch-size", "400")
    said = compare(tmp_path, *cells, "--jobs", 2)
    assert said.splitlines()[-1] == str(tmp_path / "report.html")
    assert {path.name for path in (tmp_path / "server").iterdir()} == {
        "sl-iid-vanilla-1-0", "sl-iid-vanilla-3-0",
    }  # fmt: skip
    assert "cut 1" in (tmp_path / "report.html").read_text()
    for option in (("--sweep", "cut=5"), ("--cut", "1")):
        assert "give all its values in one --sweep" in compare(tmp_path, *cells, *option, code=2)
    assert not (tmp_path / "server/sl-iid-vanilla-5-0").exists()
