"""Watching a run from its folder, and what the waiting server says."""

import dataclasses
import json
import os
import platform
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from sfl.archive import live_status
from sfl.archive.layout import STATUS
from sfl.archive.live_status import (
    AWAY,
    TRAINING,
    WAITING,
    Doing,
    LiveStatus,
    Now,
    Status,
    read_status,
)
from sfl.archive.run_folder import SERVER_LOG, EventLog
from sfl.errors import IntegrityError, RunError
from sfl.reports.watch import begun
from sfl.reports.watch_state import FAILED, RUNNING, SILENT, STOPPED, Watched, run_folder
from sfl.reports.watch_view import ASCII, BLOCKS, frame, sparkline
from sfl.runtime.waiting_notice import WaitingNotice
from tests.support.launch import Launcher, send_signal, wait_for
from tests.support.runs import FAST, LONG
from tests.support.simulations import simulated

ROOT = Path(__file__).parent.parent


def eventually(launcher: Launcher, *wanted: str) -> str:
    """Return the first picture that has all these words."""
    until = time.monotonic() + 60
    while True:
        shown = launcher.watch("r")
        if all(re.search(words, shown) for words in wanted):
            return shown
        assert time.monotonic() < until, shown


def test_a_run_is_watched_from_its_folder(launcher: Launcher) -> None:
    """In the waiting room, in a round, when a client and when the server is killed, and after."""
    options = ["--clients", 2, *FAST, "--rounds", 9, "--run", "r", "--keep-tensors", "none"]
    server = launcher.server(*options)
    wait_for(server, "listening")
    first = launcher.client("--client-id", 0)
    wait_for(server, "waiting for 1 of 2 clients: 1")
    shown = eventually(launcher, "it waits for clients", r"\n0 +waiting")
    assert "run r  sflv1, mlp, mnist-5k, 2 clients" in shown
    assert re.search(r"\n1 +away +\d+ s +it has not come yet", shown)
    run = launcher.folder / "server/r"
    status = read_status(run)
    assert status is not None
    assert (status.now.round, status.host) == (-1, platform.node())

    # Suspended, a client neither trains nor counts as lost: the others wait.
    second = launcher.client("--client-id", 1)
    wait_for(server, "round 1/9")
    send_signal(second, signal.SIGSTOP)
    shown = eventually(launcher, r"round [2-9] of 9, about \d+ s left for the whole run")
    assert re.search(r"\n\[#+\.+\] \d\d%\n", shown)
    assert re.search(r"\nval acc +0\.\d{4} ", shown)
    assert re.search(r"\n[\d.]+ MB from clients, [\d.]+ MB to clients in \d round", shown)

    second.process.kill()
    shown = eventually(launcher, r"\n1 +away +\d+ s .*client_1")
    assert "it is being prepared" not in shown

    server.process.kill()
    server.process.join()
    shown = launcher.watch()  # the newest
    assert re.search(r"not written since .* \d+ s ago: its process has ended", shown)
    assert f"go on with: run_server.py --resume {run}" in shown.replace("\n", "")
    first.process.kill()

    server = launcher.server("--resume", run)
    for k in range(2):
        launcher.client("--client-id", k)
    server.ended_with(0)
    shown = launcher.watch(run)
    assert "9 of 9 rounds done" in shown
    assert re.search(r"\[#+\] 100%\n", shown)
    assert not list(run.glob(f"{STATUS}*"))


@pytest.mark.slow
def test_a_live_view_ends_with_the_run(tmp_path: Path) -> None:
    """In a terminal of 80 columns: no line is wider."""
    run = simulated(tmp_path, model="mlp")
    log = (run / SERVER_LOG).read_text()
    (run / SERVER_LOG).write_text(log.rpartition("\n20")[0] + "\n")  # as if it went on
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "experiments.watch", str(run), "--interval", "0.2"]
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    viewer = subprocess.Popen(argv, cwd=ROOT, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        while b"it is being prepared" not in shown:
            shown += terminal.read(65536)
        (run / SERVER_LOG).write_text(log)
        while b"2 of 2 rounds done" not in shown:
            shown += terminal.read(65536)
        assert viewer.wait(60) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace")).splitlines()
    assert max(map(len, lines)) <= 80
    assert viewer.returncode == 0


NOW = Now(
    2, {0: Doing(TRAINING, steps=3, of_steps=6), 1: Doing(AWAY, "it left"), 2: Doing(WAITING)}
)


def picture(run: Path, width: int = 80) -> str:
    console = Console(width=width, height=40)
    with console.capture() as captured:
        console.print(frame(*Watched(run).look(), console))
    return captured.get()


@pytest.fixture
def going_on(tmp_path: Path) -> Path:
    """Return a run's folder as in the middle of its third round of four."""
    (tmp_path / SERVER_LOG).write_text("2026-01-01 00:00:00 a stranger's \x1b[31m\n")
    (tmp_path / "config.json").write_text(json.dumps({"rounds": 4, "clients": 3, "port": 1}))
    rows = ["round,train_loss,val_loss,val_acc,seconds,bytes_up,bytes_down,missing"]
    rows += [f"{i},{2 - i},1.5,{i / 10},10.0,1000,2000000," for i in range(2)]
    (tmp_path / "rounds.csv").write_text("\n".join(rows) + "\n3,0.1")  # the last is being written
    return tmp_path


def test_the_time_that_is_left(going_on: Path) -> None:
    with LiveStatus(going_on, lambda: NOW):
        while (status := read_status(going_on)) is None:
            time.sleep(0.01)
    moment = dataclasses.replace(status, written_at=status.round_began_at + 4.0)
    seen, _ = Watched(going_on).look()
    assert dataclasses.replace(seen, status=moment).left_s == 6.0 + 10.0
    late = dataclasses.replace(status, written_at=status.round_began_at + 15.0)
    assert dataclasses.replace(seen, status=late).left_s == 10.0
    first = dataclasses.replace(seen, status=moment, rounds=[])
    assert first.left_s == 4 * 8.0 - 4.0  # half of a round took 4 s
    assert not list(going_on.glob(f"{STATUS}*"))


@pytest.mark.parametrize("width", [80, 120])
def test_a_picture_fits_the_terminal(going_on: Path, width: int) -> None:
    many = {k: Doing(TRAINING, steps=3, of_steps=6) for k in range(30)} | {
        7: Doing(AWAY, "x" * 500)
    }
    with LiveStatus(going_on, lambda: Now(2, many)):
        while read_status(going_on) is None:
            time.sleep(0.01)
        shown = picture(going_on, width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 24
    assert re.search(r"\n7 +away", shown)
    assert "and 23 training" in shown
    assert "2.0 kB from clients, 4.0 MB to clients in 2 rounds" in shown
    assert re.search(r"val acc +0.0000 +0.1000 +▁█", shown)
    assert "\x1b" not in shown


def test_signs_of_life(going_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run counts as dead by its process, on this machine, or after a silence."""
    with LiveStatus(going_on, lambda: NOW):
        while (status := read_status(going_on)) is None:
            time.sleep(0.01)
    seen, _ = Watched(going_on).look()
    here = dataclasses.replace(seen, status=status)
    assert here.state(29.0) == RUNNING
    assert here.state(31.0) == SILENT
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = dataclasses.replace(status, pid=gone.pid)
    assert dataclasses.replace(seen, status=ended).state(1.0) == SILENT
    elsewhere = dataclasses.replace(status, pid=gone.pid, host="another")
    assert dataclasses.replace(seen, status=elsewhere).state(1.0) == RUNNING

    # The machine's clock is an hour behind ours: what counts is that the file changes.
    ago = time.time() - 3600
    os.utime(going_on / SERVER_LOG, (ago, ago))
    watched = Watched(going_on)
    assert watched.look()[1] > 3500
    os.utime(going_on / SERVER_LOG, (ago + 2, ago + 2))
    assert watched.look()[1] < 10


@pytest.mark.parametrize(
    "change",
    [
        {"now": 1},
        {"written_at": 1e300},
        {"round_began_at": float("inf")},
        {"now": {"round": 10**20, "clients": {}}},
        {
            "now": {"round": 1, "clients": {"0": asdict(Doing(TRAINING, "", 7, 6))}},
            "since": {"0": 1.0},
        },
        {"since": {"0": 1.0}},
        {"written_at": "now"},
        {"now": {"round": 1, "clients": {"0": asdict(Doing("dancing"))}}, "since": {"0": 1.0}},
    ],
)
def test_a_damaged_status_is_one_line(going_on: Path, change: dict[str, object]) -> None:
    whole = asdict(Status(Now(1, {}), {}, 1.0, 1.0, "here", 1))
    (going_on / STATUS).write_text(json.dumps(whole))
    assert "round 2 of 4" in picture(going_on)
    for text in (json.dumps(whole | change), "{"):
        (going_on / STATUS).write_text(text)
        with pytest.raises(IntegrityError, match=r"status\.json: is damaged: "):
            picture(going_on)


@pytest.mark.parametrize(
    "lines",
    [
        "round,val_loss\n0,1.0",
        "round,seconds\nabc,1.0",
        "round,seconds\n0.5,1.0",
        "round,seconds\n0,inf",
        "round,seconds\n0,nan",
        "round,val_loss,seconds\n0,much,1.0",
        "round,seconds\n0,1.0,2.0",
        f"round,seconds\n0,{'1' * 200_000}",
        "round,seconds\n0,\x00\udcff",
    ],
)
def test_a_damaged_table_of_rounds_is_one_line(going_on: Path, lines: str) -> None:
    data = (lines + "\n").encode(errors="surrogateescape")
    (going_on / "rounds.csv").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"rounds\.csv: is damaged: "):
        picture(going_on)


def test_a_strangers_texts_are_texts(tmp_path: Path, going_on: Path) -> None:
    """Names of metrics, of the model and of the folder; figures of any size."""
    rows = ["round,val_[/x]\x1b[2J,test_[red],seconds", "0,1e308,1.0,1.0", "1,-1e308,nan,1.0"]
    (going_on / "rounds.csv").write_text("\n".join(rows) + "\n")
    config = {"rounds": 10**20, "clients": 3, "port": 1, "model": "a:b\x1b[2J"}
    (going_on / "config.json").write_text(json.dumps(config))
    (going_on / "checkpoints").mkdir()
    (going_on / "checkpoints/round_000.json").touch()
    os.utime(going_on / SERVER_LOG, (0, 0))
    odd = going_on.rename(tmp_path.parent / "a\x1b[2J\udc80")
    shown = picture(odd)
    assert "\x1b" not in shown
    assert "run a [2J" in shown
    assert "val [/x] [2J" in shown
    assert "--allow-importa:b[2J" in "".join(shown.split())  # wherever the line is broken
    assert re.search(r"\] 0%\n", shown)
    assert "1e+308" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_status_that_cannot_be_written_disturbs_nobody(tmp_path: Path) -> None:
    looked = []
    with LiveStatus(tmp_path / "gone", lambda: looked.append(1) or NOW):
        while not looked:
            time.sleep(0.01)
    assert not (tmp_path / "gone").exists()


def test_a_look_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_status, "EVERY_S", 0.01)
    fails = iter([RuntimeError("dictionary changed size during iteration")])

    def look() -> Now:
        for error in fails:
            raise error
        return NOW

    with LiveStatus(tmp_path, look):
        until = time.monotonic() + 10
        while read_status(tmp_path) is None:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_which_run_is_watched(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run in "):
        run_folder("", tmp_path)
    for at, name in enumerate(("old", "new", "older")):
        folder = tmp_path / "server" / name
        folder.mkdir(parents=True)
        (folder / SERVER_LOG).touch()
        os.utime(folder / SERVER_LOG, (at % 2, at % 2))
    assert run_folder("", tmp_path) == tmp_path / "server/new"
    assert run_folder("old", tmp_path) == tmp_path / "server/old"
    assert run_folder(str(tmp_path / "server/old"), Path("no")) == tmp_path / "server/old"
    with pytest.raises(RunError, match="there is no run other"):
        run_folder("other", tmp_path)


def test_a_named_run_may_begin_in_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80)
    folder = tmp_path / "server/r"

    def begin(pause_s: float) -> None:
        folder.mkdir(parents=True)
        (folder / SERVER_LOG).touch()

    monkeypatch.setattr("sfl.reports.watch.time.sleep", begin)
    with console.capture() as captured:
        assert begun("r", tmp_path, console) == folder
    assert captured.get() == "waiting for the run r to begin\n"
    monkeypatch.setattr("sfl.reports.watch.BEGINS_WITHIN_S", -1.0)
    with pytest.raises(RunError, match="there is no run other"):
        begun("other", tmp_path, console)


def test_an_interrupted_run_may_go_on(going_on: Path) -> None:
    with open(going_on / SERVER_LOG, "a") as log:
        log.write("2026-01-01 00:00:01 the run failed: it was interrupted\n")
        log.write("2026-01-01 00:00:01 go on with: run_server.py\n")
    seen, silent_s = Watched(going_on).look()
    assert seen.state(silent_s) == STOPPED
    assert "2 of 4 rounds done; it was interrupted" in picture(going_on)
    simulated = dataclasses.replace(seen, config={"rounds": 4})
    assert simulated.state(silent_s) == FAILED


def test_a_followers_folder_tells_less(going_on: Path) -> None:
    """A hop has no figures, and is started again as it was, like a task's server."""
    config = {"rounds": 4, "clients": 3, "port": 1, "role": "hop:1"}
    (going_on / "config.json").write_text(json.dumps(config))
    (going_on / "rounds.csv").unlink()
    (going_on / "rounds").mkdir()
    (going_on / "rounds/round_000.csv").touch()
    shown = picture(going_on)
    assert "3 clients, hop:1" in shown
    assert "25%" in shown
    with LiveStatus(going_on, lambda: Now(0, {0: Doing(TRAINING, "", 9, 9)})):
        while not read_status(going_on):
            time.sleep(0.01)
        assert "25%" in picture(going_on)  # what all have trained is not counted twice
    os.utime(going_on / SERVER_LOG, (0, 0))
    shown = " ".join(picture(going_on).split())
    assert "has ended or hangs go on with: the command that started this hop:1 00:00:00" in shown
    (going_on / "rounds.csv").write_text("round,train_loss,seconds\n0,1.5,2.0\n")
    assert "from clients" not in picture(going_on)


def test_sparklines() -> None:
    assert sparkline([1.0, 2.0, 3.0], 8) == "▁▅█"
    assert sparkline([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"
    assert sparkline([5.0, 5.0], 8, ASCII) == "__"
    assert sparkline([float("nan"), float("inf")], 8) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert len(BLOCKS) == 8


def test_a_waiting_server_says_so_at_growing_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    path = tmp_path / SERVER_LOG
    with EventLog(path) as log, WaitingNotice(log, lambda: now) as notice:
        said = []
        while now < 3600:
            if notice.update("waiting for 1 of 2 clients: 1; there: client_0"):
                said.append(now)
            now += 0.5
        assert said == [10.0, 60.0, *(600.0 * i for i in range(1, 6))]
        notice.update("")
        now += 9.5
        assert not notice.update("waiting for client_1")  # a new wait
    lines = path.read_text().splitlines()
    assert len(lines) == len(said)
    assert lines[1].endswith("waiting for 1 of 2 clients: 1; there: client_0; for 1 min 0 s")
    assert capsys.readouterr().out.count("\n") == len(said)  # this is no terminal


def test_a_server_says_whom_a_round_waits_for(launcher: Launcher) -> None:
    slow = "tests.support.slow_data:slow_to_load"
    server = launcher.server("--clients", 2, *LONG, "--run", "r", "--dataset", slow)
    options = [["--client-id", k, "--allow-import", slow] for k in range(2)]
    clients = [launcher.client(*of_client) for of_client in options]
    wait_for(server, "round 2/1000")
    clients[1].process.kill()
    wait_for(server, "there: client_0; for 1")  # 10 seconds, or a little more
    wait_for(clients[0], "waiting for client_1 (client_1")
    launcher.client(*options[1])
    eventually(launcher, r"\n1 +loading its data")


def test_an_interrupt_while_it_starts_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        while not (tmp_path / STATUS).exists():
            thread.join(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), LiveStatus(tmp_path, lambda: NOW):
        pass
    assert list(tmp_path.iterdir()) == []
