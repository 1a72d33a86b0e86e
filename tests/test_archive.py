"""The archive: what is written off the critical path, and its one reader."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sfl.archive
from sfl.archive import write_queue
from sfl.archive.layout import GRADS, LABELS, MANIFEST, STATUS, TENSOR_KINDS
from sfl.archive.manifest import DROPPED, ROUND_LOG, Entry, manifest_line
from sfl.archive.writer import ArchiveWriter
from sfl.errors import IntegrityError, RunError
from sfl.files import atomic as atomic_file
from sfl.files.atomic import write_file
from sfl.files.regular_files import check_linkless, check_no_links
from sfl.files.torch_file import TensorSpec, encode_file
from sfl.values import KeepTensors, Position

ALL = KeepTensors.parse("all")


def record(
    writer: ArchiveWriter, client: int, round_index: int, step: int, *, link: int = 0
) -> None:
    """Record a step whose tensors say where they belong; labels cross the first cut alone."""
    tensors = {
        kind: torch.tensor([client, round_index, step, number + 10 * link])
        for number, kind in enumerate(TENSOR_KINDS)
        if not link or kind != LABELS
    }
    files = {kind: (encode_file(t), TensorSpec.of(t)) for kind, t in tensors.items()}
    writer.record_step(files, Position("r", round_index, step, client, link), order=step)


def write_run(root: Path, keep: str = "all", rounds: int = 3) -> None:
    with ArchiveWriter(root, KeepTensors.parse(keep)) as writer:
        for r in range(rounds):
            for step in range(2):
                for client in (1, 0):
                    record(writer, client, r, step)
            writer.end_round(r)


def found(root: Path, **chosen: int) -> list[tuple[int, int, int]]:
    return [(s.round, s.order, s.client) for s in sfl.archive.open(root).steps(**chosen)]


def test_steps_are_read_back_in_order_of_processing(tmp_path: Path) -> None:
    write_run(tmp_path)
    everything = [(r, s, k) for r in range(3) for s in range(2) for k in range(2)]
    assert found(tmp_path) == everything
    assert found(tmp_path, client=0, round=2) == [(2, 0, 0), (2, 1, 0)]
    for step in sfl.archive.open(tmp_path).steps(client=1):
        place = [step.client, step.round, step.step]
        assert step.labels.tolist() == [*place, 0]
        assert step.activations.tolist() == [*place, 1]
        assert step.grads.tolist() == [*place, 2]


def test_the_layout_is_the_fixed_one(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=1)
    folder = tmp_path / "client_files" / "client_1" / "round_000"
    names = {f"{kind}_0_{step}.pt" for kind in TENSOR_KINDS for step in range(2)} | {MANIFEST}
    assert {path.name for path in folder.iterdir()} == names
    assert torch.load(folder / "grads_0_1.pt", weights_only=True).tolist() == [1, 0, 1, 2]


def test_a_second_cut_has_its_own_files_and_is_read_back_behind_the_first(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path, ALL) as writer:
        for step in range(2):
            for link in (1, 0):
                record(writer, 3, 0, step, link=link)
        writer.end_round(0)
    folder = tmp_path / "client_files/client_3/round_000"
    assert {path.name for path in folder.glob("*_1*.pt")} == {
        "labels_0_1.pt", "split_layer_tensor_0_1.pt", "grads_0_1.pt",  # step 1 at the first cut
        "split_layer_tensor_0_0_1.pt", "grads_0_0_1.pt",
        "split_layer_tensor_0_1_1.pt", "grads_0_1_1.pt",
    }  # fmt: skip
    steps = list(sfl.archive.open(tmp_path).steps())
    assert [(s.step, s.link) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for s in steps:
        assert s.activations.tolist() == [3, 0, s.step, 1 + 10 * s.link]
        assert s.grads.tolist() == [3, 0, s.step, 2 + 10 * s.link]
    with pytest.raises(IntegrityError, match="step 1, cut 1: has no labels recorded"):
        _ = steps[3].labels


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", [0, 1, 2]), ("last", [2]), ("every:2", [0, 2]), ("none", [])]
)
def test_only_the_rounds_that_were_asked_for_stay(
    tmp_path: Path, keep: str, kept: list[int]
) -> None:
    write_run(tmp_path, keep)
    if keep == "none":
        assert list(tmp_path.iterdir()) == []
        return
    assert sfl.archive.open(tmp_path).rounds() == kept
    assert sorted({r for r, _, _ in found(tmp_path)}) == kept


@pytest.mark.parametrize("written_before", [True, False])
def test_a_file_that_a_run_replaces_or_removes_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before: bool
) -> None:
    """As a task's server does with a round's file, ``--keep-models`` with a model."""
    table, model = "rounds/round_000.csv", "models/client_model_000.pt"
    with ArchiveWriter(tmp_path, ALL) as writer:
        for path in (table, model):
            writer.write(ROUND_LOG, path, b"old", 0)
        writer.flush()
        archive = sfl.archive.open(tmp_path)

        def go_on(seconds: float = 0) -> None:
            """Let the run list what it has just done."""
            monkeypatch.undo()
            writer.write(ROUND_LOG, table, b"newer", 0)
            writer.flush()
            with (tmp_path / MANIFEST).open("a") as manifest:
                manifest.write(manifest_line(Entry(DROPPED, model, 0, "", round=0)) + "\n")

        (tmp_path / table).write_bytes(b"newer")
        (tmp_path / model).unlink()
        (tmp_path / STATUS).touch()
        go_on() if written_before else monkeypatch.setattr(time, "sleep", go_on)
        assert archive.read(table) == b"newer"
        with pytest.raises(RunError, match="was removed while it was to be read"):
            archive.read(model)
        flip(tmp_path / table, 0)
        with pytest.raises(IntegrityError, match="is damaged"):
            archive.read(table)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    (step, _) = sfl.archive.open(tmp_path).steps(client=0, round=1)
    flip(step.path(GRADS), 700)
    assert step.labels.tolist() == [0, 1, 0, 0]
    with pytest.raises(IntegrityError, match=r"client_0/round_001/grads_1_0.pt: is damaged"):
        _ = step.grads
    step.path(LABELS).unlink()
    fresh = next(iter(sfl.archive.open(tmp_path).steps(client=0, round=1)))
    with pytest.raises(IntegrityError, match=r"labels_1_0.pt: No such file"):
        _ = fresh.labels


def test_every_byte_of_every_manifest_counts(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=1)
    for path in (tmp_path / MANIFEST, tmp_path / "client_files/client_0/round_000" / MANIFEST):
        whole = path.read_bytes()
        for where in range(len(whole)):
            flip(path, where)
            with pytest.raises(IntegrityError, match=rf"{path}: is damaged"):
                found(tmp_path)
            path.write_bytes(whole)
    assert len(found(tmp_path)) == 4


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    write_run(tmp_path, rounds=1)
    for path in ("../secret", "/etc/passwd"):
        entry = Entry("config", path, 3, "crc32:00000000")
        with open(tmp_path / MANIFEST, "a") as manifest:
            manifest.write(manifest_line(entry) + "\n")
        with pytest.raises(IntegrityError, match="a path outside the folder"):
            sfl.archive.open(tmp_path)


def test_the_files_of_a_run_that_was_killed_are_read_as_far_as_they_are_whole(
    tmp_path: Path,
) -> None:
    with ArchiveWriter(tmp_path, ALL) as writer:
        writer.write("config", "config.json", b"{}")
        for step in range(3):
            record(writer, 0, 0, step)
    manifest = tmp_path / "client_files/client_0/round_000" / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert found(tmp_path) == [(0, 0, 0), (0, 1, 0)]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            Entry(
                "labels", "labels_0_7.pt", 12, "crc32:0123abcd", 1, 0, 7, 0, 3, 0, (4, 1), "int64"
            ),
            '{"kind": "labels", "path": "labels_0_7.pt", "bytes": 12, "checksum": "crc32:0123abcd",'
            ' "client": 1, "round": 0, "step": 7, "link": 0, "order": 3, "offset": 0,'
            ' "shape": [4, 1], "dtype": "int64", "clients": [], "check": "crc32:6b489731"}',
        ),
        (
            Entry("round_log", 'a "name"\\ü\n', 0, "", round=-1, clients=(0, 2, 5)),
            r'{"kind": "round_log", "path": "a \"name\"\\\u00fc\n", "bytes": 0, "checksum": "",'
            ' "client": -1, "round": -1, "step": -1, "link": 0, "order": -1, "offset": 0,'
            ' "shape": [], "dtype": "", "clients": [0, 2, 5], "check": "crc32:f13be103"}',
        ),
    ],
)
def test_a_manifests_line_is_as_in_all_runs_before(entry: Entry, line: str) -> None:
    assert manifest_line(entry) == line


def test_a_file_under_its_name_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x", b"old")

    def fail(source: Path, target: Path) -> None:
        assert (tmp_path / "x").read_bytes() == b"old"
        assert Path(source).read_bytes() == b"new"
        raise OSError("killed before the rename")

    monkeypatch.setattr(atomic_file.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_what_waits_to_be_written_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_queue, "MAX_PENDING_BYTES", 10_000)
    gate, peak = threading.Event(), 0
    with ArchiveWriter(tmp_path, ALL) as writer:
        writer._queue.submit(lambda: gate.wait(30) and None, 0)
        opener = threading.Timer(0.2, gate.set)
        opener.start()
        for number in range(100):
            writer.write("x", f"{number}.bin", bytes(1000))
            peak = max(peak, writer._queue.pending_bytes)
        assert gate.is_set()  # so the producer had to wait for the disk
        writer.flush()
    assert 10_000 < peak <= 11_000
    assert len(list(tmp_path.glob("*.bin"))) == 100


def test_a_disk_that_fails_is_one_clear_error(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "client_files").write_text("in the way")
    with ArchiveWriter(root, ALL) as writer:
        with pytest.raises(RunError, match=rf"cannot write to {root}: Not a directory"):
            record_until_it_fails(writer)
        with pytest.raises(RunError, match="cannot write"):
            writer.flush()


def record_until_it_fails(writer: ArchiveWriter) -> None:
    record(writer, 0, 0, 0)  # fails here if the thread was quick
    writer.flush()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no folder of a run"):
        sfl.archive.open(tmp_path)


def test_what_a_round_gave_is_on_disk_before_the_round_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is synced before it gets its name, its folder after; the manifest's line last."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        (path,) = (p for p in (tmp_path, *tmp_path.rglob("*")) if p.stat().st_ino == number)
        calls.append(f"sync {path.relative_to(tmp_path)}")
        fsync(descriptor)

    def noted_replace(source: str, target: Path | str) -> None:
        calls.append(f"rename {Path(target).relative_to(tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with ArchiveWriter(tmp_path, ALL) as writer:
        writer.write("client_model", "models/client_model_000.pt", b"weights", 0)
        record(writer, 0, 0, 0)
        writer.write(ROUND_LOG, "rounds/round_000.csv", b"figures", 0)
        writer.commit(1, {}, {}, ["models/client_model_000.pt"])
        writer.flush()
    durable = [call for call in calls if "client_files" not in call]
    assert durable == [
        "sync .",
        "sync models/client_model_000.pt.tmp",
        "rename models/client_model_000.pt",
        "sync models",
        "sync .",
        "sync rounds/round_000.csv.tmp",
        "rename rounds/round_000.csv",
        "sync rounds",
        f"sync {MANIFEST}",
        "sync .",
        "sync checkpoints/round_001.json.tmp",
        "rename checkpoints/round_001.json",
        "sync checkpoints",
    ]
    assert [c for c in calls if "client_files" in c and c.startswith("sync")] == []


def test_a_step_is_written_without_anybody_waiting_for_it(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path, ALL) as writer:
        record(writer, 0, 0, 0)
        deadline = time.monotonic() + 30
        while len(list(tmp_path.rglob("*.pt"))) < len(TENSOR_KINDS):
            assert time.monotonic() < deadline


def test_what_was_handed_over_is_written_when_a_run_is_interrupted(tmp_path: Path) -> None:
    def run() -> None:
        with ArchiveWriter(tmp_path, ALL) as writer:
            for step in range(20):
                record(writer, 0, 0, step)
            writer.end_round(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert found(tmp_path) == [(0, step, 0) for step in range(20)]
    assert not list(tmp_path.rglob("*.tmp"))


WITH_FILES = ("models/m", "client_files/client_0/r", "rounds/round_000.csv", "tracked/wandb/f")


@pytest.mark.parametrize(
    "what", ["models", "client_files/client_0", "rounds/round_000.csv", "tracked/wandb"]
)
def test_a_run_with_a_link_is_not_read(tmp_path: Path, what: str) -> None:
    """What it leads to is somebody else's."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in WITH_FILES:
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_bytes(b"x")
    (run / MANIFEST).touch()
    assert sfl.archive.open(run).listed == []
    (run / what).rename(elsewhere)
    (run / what).symlink_to(elsewhere)
    with pytest.raises(RunError, match=f"{run / what}: is a link"):
        sfl.archive.open(run)
    run.rename(tmp_path / "real")
    run.symlink_to(tmp_path / "real")  # the folder's own name is the reader's choice
    (run / what).unlink()
    elsewhere.rename(run / what)
    assert sfl.archive.open(run).listed == []


@pytest.mark.parametrize("check", [check_linkless, check_no_links])
def test_what_goes_while_a_folder_is_looked_through_is_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], None]
) -> None:
    """A run may write there: its status.json is replaced each second."""
    (tmp_path / "models").mkdir()
    (tmp_path / "status.json.tmp").touch()
    scandir, looked_into = os.scandir, []

    def listed_and_gone(folder: Path) -> contextlib.nullcontext[list[os.DirEntry[str]]]:
        looked_into.append(Path(folder))
        with scandir(folder) as entries:
            there = list(entries)
        for entry in there:
            (os.rmdir if entry.is_dir() else os.unlink)(entry.path)
        return contextlib.nullcontext(there)

    monkeypatch.setattr(os, "scandir", listed_and_gone)
    check(tmp_path)
    assert looked_into == [tmp_path, tmp_path / "models"]
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "models")  # the folder itself must be there
