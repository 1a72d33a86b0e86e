"""The report of runs: what its page and files have, and that nothing in it is executed."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sfl
from sfl.archive.manifest import Entry, manifest_line, read_manifest
from sfl.errors import ConfigError, RunError
from sfl.files.checksum import checksum
from sfl.interactive.drawing import bar_style
from sfl.interactive.run import open_runs
from sfl.model.task import TASKS
from sfl.reports import figures
from sfl.reports.gathered import Group, confusion, gather
from sfl.reports.report import write_report
from tests.support.chromium import Chromium, needs_chromium
from tests.support.programs import run_program
from tests.support.regression import REGRESSION
from tests.support.simulations import simulated

EMPTY = {"meta", "img", "wbr"}  # tags that have no end
SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A page taken apart: its tags, texts and images; fails if a tag is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.images: dict[str, str] = {}  # by what they show
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open += [tag] if tag not in EMPTY else []
        named = dict(attrs)
        self.addresses += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "data")]
        if tag == "img":
            code = (named["src"] or "").removeprefix("data:image/svg+xml;base64,")
            self.images[named["alt"] or ""] = base64.b64decode(code, validate=True).decode()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["wbr"]:  # where a long name may be broken
            self.tags.pop()
            self.texts[-1] += data.strip()
        else:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(filter(None, self.texts))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs: two seeds of one configuration, and another scheme."""
    out = tmp_path_factory.mktemp("runs")
    common = {"model": "mlp", "rounds": 2, "batch_size": 200}
    for name, own in {
        "a": {"seed": 1}, "b": {"seed": 2}, "c": {"scheme": "fl", "seed": 1},
    }.items():  # fmt: skip
        simulated(out, run=name, **common, **own)
    return out


def opened(out: Path, *names: str) -> list[sfl.Run]:
    return [sfl.open_run(out / "server" / name) for name in names]


def test_the_page_has_everything_inside(out: Path, tmp_path: Path) -> None:
    (path,) = write_report(opened(out, "a", "b", "c"), tmp_path / "r.html")
    page = Page(path)
    assert "script" not in page.tags
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "url(" not in path.read_text()
    for image in page.images.values():
        assert re.findall(r'(?:href|src)="(?!#|data:)', image) == []
        assert "<script" not in image
    shown = " ".join(page.images)
    for what in ("validation accuracy by round", "training loss by round", "who waited for whom",
                 "taken for: scheme sflv1", "taken for: scheme fl", "bytes of a round",
                 "seconds of a round", "training loss of each client"):  # fmt: skip
        assert what in shown, what
    assert "The server's log tells of none." in page.text
    assert "AVX" in page.text or "capability" in page.text
    assert path.stat().st_size < 1e6  # two curves
    looks = {str(bar_style(number)["hatch"]) for number in range(14)}
    assert not set(".oO*") & set("".join(looks))  # of each such hatch, 100 kB and more


@pytest.mark.slow
def test_figures_are_means_over_the_seeds(out: Path, tmp_path: Path) -> None:
    runs = opened(out, "a", "b", "c")
    assert [group.label for group in gather(runs)] == ["scheme sflv1", "scheme fl"]
    paths = write_report(runs, tmp_path / "r.html", with_tables=True, formats=["png"])
    table = pd.read_csv(tmp_path / "r_final.csv", dtype=str).set_index("runs")
    both = pd.Series([run.rounds["test_acc"].iloc[-1] for run in runs[:2]])
    assert table.loc["scheme sflv1", "test_acc"] == f"{both.mean():.4f} ± {both.std():.4f}"
    assert table.loc["scheme fl", "test_acc"] == f"{runs[2].rounds['test_acc'].iloc[-1]:.4f}"
    assert table.loc["scheme sflv1", "test_acc"] in Page(tmp_path / "r.html").text
    latex = (tmp_path / "r_final.tex").read_text()
    assert r"\toprule" in latex
    assert r"test\_acc" in latex
    clients = pd.read_csv(tmp_path / "r_clients.csv")
    assert len(clients) == 6
    assert all(path.is_file() for path in paths)
    assert (tmp_path / "r_val_acc.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@needs_chromium
def test_tables_fit_on_paper(out: Path, tmp_path: Path) -> None:
    (path,) = write_report(opened(out, "a", "b", "c"), tmp_path / "r.html")
    widest = "Math.max(...[...document.querySelectorAll('table')].map((t) => t.offsetWidth))"
    with Chromium(tmp_path) as browser:
        tab = browser.open(path.as_uri(), size=(720, 1000))  # A4 between Chromium's margins
        assert tab.evaluate(widest) > 720  # on a screen, it is moved sideways
        tab.command("Emulation.setEmulatedMedia", {"media": "print"})
        assert tab.evaluate(widest) <= 720


def test_the_same_seed_twice_is_another_curve(out: Path, tmp_path: Path) -> None:
    assert [len(group.runs) for group in gather(opened(out, "a", "a", "b"))] == [2, 1]
    labels = [group.label for group in gather(opened(out, "a", "c"), ["x", "y"])]
    assert labels == ["x", "y"]
    with pytest.raises(ConfigError, match="--labels: has 1, for 2 curves"):
        gather(opened(out, "a", "c"), ["x"])
    with pytest.raises(ConfigError, match="--labels: one is empty"):
        gather(opened(out, "a", "c"), ["x", ""])
    a = opened(out, "a", "a")
    assert len(sfl.plot(a)[0].lines) == 4  # training and validation of each
    assert len(sfl.plot(a, ["x", "x"])[0].lines) == 4
    with pytest.raises(ConfigError, match="labels: has 1, for 2 runs"):
        sfl.plot(a, ["x"])
    with pytest.raises(ConfigError, match="no run to draw"):
        sfl.plot([])
    (page,) = write_report(opened(out, "a"), tmp_path / "new")
    assert page == tmp_path / "new/report.html"
    with pytest.raises(ConfigError, match="--figures gif: give some of pdf, svg, png"):
        write_report(opened(out, "a"), tmp_path / "r.html", formats=["gif"])


def changed(run: Path, path: str, content: bytes) -> None:
    """Write a file of a run as somebody might who wants us to read it."""
    (run / path).write_bytes(content)
    entries = [
        Entry(e.kind, path, len(content), checksum(content)) if e.path == path else e
        for e in read_manifest(run)
    ]
    (run / "manifest.jsonl").write_bytes("".join(f"{manifest_line(e)}\n" for e in entries).encode())


@pytest.mark.slow
def test_a_strangers_texts_are_texts(out: Path, tmp_path: Path) -> None:
    run = tmp_path / "server/z"
    shutil.copytree(out / "server/a", run)
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["classes"][3] = f"{SCRIPT}$x_{{$"
    environment["command_line"] = 5
    environment["packages"] = {SCRIPT: SCRIPT}
    changed(run, "environment.json", json.dumps(environment).encode())
    log = (run / "server_log.txt").read_bytes()
    changed(run, "server_log.txt", log + f"2026-01-01 00:00:00 warning: {SCRIPT}\n".encode())
    config = json.loads((run / "config.json").read_text()) | {"model": f"evil:{SCRIPT}"}
    named, classes = tmp_path / "named.html", tmp_path / "classes.html"
    write_report(opened(tmp_path, "z"), classes)
    changed(run, "config.json", json.dumps(config).encode())
    rounds = (run / "rounds.csv").read_text()
    changed(run, "rounds.csv", rounds.replace("val_acc", "val_a/b").encode())
    runs = [*opened(tmp_path, "z"), *opened(out, "a")]
    write_report(runs, named, labels=[SCRIPT, "option"], formats=["svg"])
    assert (tmp_path / "named_val_a_b.svg").is_file()
    for path in (named, classes):
        page = Page(path)
        assert "script" not in page.tags
        assert SCRIPT in page.text
        assert not any("<script" in image for image in page.images.values())
    assert f"warning: {SCRIPT}" in Page(named).text
    assert "evil" in Page(named).text  # which is not imported: no confusion of it
    assert "not drawn" in Page(named).text


def test_a_run_that_is_not_over(out: Path, tmp_path: Path) -> None:
    run = tmp_path / "server/a"
    shutil.copytree(out / "server/a", run)
    later = re.compile(r"rounds\.csv|server_log\.txt|rounds/round_001\.csv|predictions/.*")
    entries = [e for e in read_manifest(run) if not later.fullmatch(e.path)]
    (run / "manifest.jsonl").write_bytes("".join(f"{manifest_line(e)}\n" for e in entries).encode())
    rows = (run / "rounds.csv").read_text().splitlines(keepends=True)
    for count, said in ((2, "1 round of 2"), (1, "0 rounds of 2")):
        (run / "rounds.csv").write_text("".join(rows[:count]))
        (path,) = write_report(opened(tmp_path, "a"), tmp_path / "r.html")
        page = Page(path)
        assert said in page.text
        assert "no test set was evaluated" in page.text
        assert ("training loss by round" in " ".join(page.images)) == (count == 2)


def test_who_trains_again_during_the_evaluation_has_not_waited_between() -> None:
    times = {"training_start_s": 0.5, "training_end_s": 4.0}
    times |= {"evaluation_start_s": 3.0, "evaluation_end_s": 5.0}
    spans = [(title, start, end) for title, _, start, end in figures._spans(times, 6.0)]
    assert spans == [
        ("waiting for others", 0.0, 0.5),
        ("training", 0.5, 4.0),
        ("evaluation", 3.0, 5.0),
        ("waiting for others", 5.0, 6.0),
    ]


@pytest.mark.slow
def test_other_kinds_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "regression", REGRESSION)
    kinds: dict[str, dict[str, object]] = {
        "one": {"clients": 1},
        "central": {"scheme": "central"},
        "vertical": {"partition": "vertical", "topology": "vertical"},
        "u-shaped": {"model": "lenet5", "cut": "3,9"},
        "many": {"clients": 10, "participation": 0.3, "keep_models": "last"},
        "task": {"task": "regression", "model": "tests.support.regression:one_number", "cut": 2},
    }
    for name, own in kinds.items():
        simulated(tmp_path, **{"model": "mlp", "run": name, "batch_size": 400, "rounds": 1} | own)
    (path,) = write_report(opened(tmp_path, *kinds), tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    shown = " ".join(page.images)
    for name in set(kinds) - {"task"}:
        assert f"taken for: {name}" in shown, name
    assert "task: not drawn: --task regression predicts no classes" in page.text
    assert "activations up, link 1" in page.text or "gradients up, link 1" in page.text
    write_report(opened(tmp_path, "task"), tmp_path / "task.html")
    assert "validation share of near guesses by round" in Page(tmp_path / "task.html").images


def test_a_run_that_stopped_early_and_diverged(tmp_path: Path) -> None:
    simulated(
        tmp_path, model="mlp", rounds=4, batch_size=800, stop_when="val_loss:patience=1,min_delta=9"
    )
    (run,) = opened(tmp_path, "r")
    names = run.clients.columns
    run.clients.loc[:, names == "test_loss"] = float("nan")  # as when it overflows
    page = Page(write_report([run], tmp_path / "r.html")[0])
    assert "2 rounds of 4, stopped early" in page.text
    assert "r: the run stops after round 2/4: val_loss has not become better" in page.text
    assert "taken for: r" in " ".join(page.images)


def test_clients_folders_go_to_their_own_runs(tmp_path: Path) -> None:
    """Also runs of one name, which differ in the seed: from two servers."""
    common = {"model": "mlp", "cut": "3,5", "batch_size": 800, "rounds": 1, "keep_tensors": "none"}
    brought = []
    for seed in (1, 2):
        path = simulated(tmp_path / f"of_{seed}", seed=seed, **common)
        for k in range(3):
            brought.append(tmp_path / f"brought/{seed}_{k}")
            shutil.move(tmp_path / f"of_{seed}/client/r/client_{k}", brought[-1])
            said = (path / "config.json").read_bytes()
            entry = Entry("config", "config.json", len(said), checksum(said))
            with open(brought[-1] / "manifest.jsonl", "a") as manifest:
                manifest.write(f"{manifest_line(entry)}\n")
            (brought[-1] / "config.json").write_bytes(said)
    folders = [tmp_path / f"of_{seed}/server/r" for seed in (1, 2)]
    runs = open_runs(folders, clients=brought)
    for run in runs:
        right = np.trace(confusion(Group("", [run])).counts) / 1000
        assert right == pytest.approx(run.rounds["test_acc"].iloc[-1])
    with pytest.raises(RunError, match=r"brought/2_0 is no client's folder of .*of_1/server/r"):
        open_runs(folders[:1], clients=brought)


@pytest.mark.slow
def test_the_program(out: Path, tmp_path: Path) -> None:
    runs = [out / "server" / name for name in ("a", "c")]
    page = tmp_path / "page.html"
    done = run_program("-m", "experiments.report", *runs, "--out", page, "--tables")
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == str(page)
    assert (tmp_path / "page_final.tex").exists()
    said = run_program("-m", "experiments.report", tmp_path, code=1).stderr
    assert said == f"report: error: {tmp_path} is no folder of a run: it has no manifest.jsonl\n"
