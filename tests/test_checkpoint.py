"""Checkpoints that are damaged, foreign or half written: the one before is used, or nothing."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.support.same_run import compare
from sfl.archive.checkpoint import (
    NUM_KEPT,
    Checkpoint,
    checkpoint_paths,
    round_of,
    valid_checkpoints,
)
from sfl.archive.spool import Answer, Spool
from sfl.archive.writer import ArchiveWriter
from sfl.config import RunConfig
from sfl.errors import IntegrityError, RunError
from sfl.runtime.resume import open_past
from sfl.values import KeepTensors, Position
from tests.support.launch import Launcher, options_of, send_signal, wait_for
from tests.support.runs import ALLOW, OWN_STATE
from tests.support.simulations import reference

CONFIG = RunConfig(run="r")
WEIGHTS = b"weights" * 1000


def written(root: Path, rounds: int = 3) -> Path:
    """Write the checkpoints that so many rounds leave."""
    with ArchiveWriter(root, KeepTensors.parse("none")) as writer:
        for r in range(rounds):
            writer.write("client_model", f"models/client_model_{r:03d}.pt", WEIGHTS, r)
            about = {"fingerprint": {}}
            config = vars(CONFIG)
            writer.commit(r + 1, config, about, [f"models/client_model_{r:03d}.pt"])
        writer.flush()
    return root


def rounds_of(root: Path) -> tuple[list[int], list[str]]:
    damage: list[str] = []
    return [checkpoint.round for checkpoint in valid_checkpoints(root, CONFIG, damage)], damage


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    written(tmp_path, rounds=4)
    assert [round_of(path) for path in checkpoint_paths(tmp_path)] == [4, 3]
    assert NUM_KEPT == 2
    assert rounds_of(tmp_path) == ([4, 3], [])


def test_no_changed_byte_of_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    written(tmp_path)
    path = checkpoint_paths(tmp_path)[0]
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            found, damage = rounds_of(tmp_path)
        except RunError:  # its version, or its configuration
            continue
        assert found == [2], place
        assert len(damage) == 1
    for length in range(0, len(good) - 1, 50):
        path.write_bytes(good[:length])
        assert rounds_of(tmp_path)[0] == [2]


def test_a_file_that_is_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    model = tmp_path / "models/client_model_002.pt"
    model.write_bytes(WEIGHTS[:-1])
    found, (damage,) = rounds_of(tmp_path)
    assert found == [2]
    assert "client_model_002.pt: is damaged" in damage
    model.unlink()
    assert "client_model_002.pt: No such file" in rounds_of(tmp_path)[1][0]
    (tmp_path / "models/client_model_001.pt").unlink()
    with pytest.raises(IntegrityError, match="nothing to go on from is whole"):
        open_past(tmp_path, CONFIG)


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that goes on, with ``--keep-models last``."""
    written(tmp_path)

    def removed_first(self: Checkpoint) -> None:
        if self.round == 2:
            checkpoint_paths(tmp_path)[-1].unlink()
            raise IntegrityError("a model is missing")

    monkeypatch.setattr(Checkpoint, "verify", removed_first)
    assert rounds_of(tmp_path) == ([3], [])


def test_a_checkpoint_of_another_version_or_configuration_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(RunError, match=r"of another configuration: --lr 0.5: the run has 0.001"):
        open_past(tmp_path, RunConfig(run="r", lr=0.5))
    path = checkpoint_paths(tmp_path)[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(RunError, match="is of version 2; we read 1"):
        open_past(tmp_path, CONFIG)


def test_what_a_file_names_lies_in_the_folder(tmp_path: Path) -> None:
    """A run's folder may come from somebody else."""
    (tmp_path / "secret").write_bytes(WEIGHTS)
    root = written(tmp_path / "run")
    path = checkpoint_paths(root)[0]
    fields = json.loads(path.read_text())
    fields["files"] = {"../secret": fields["files"].popitem()[1]}
    del fields["check"]
    from sfl.files.checksum import checksum

    path.write_text(json.dumps(fields | {"check": checksum(json.dumps(fields).encode())}))
    assert rounds_of(root)[0] == [2]


def cut(folder: Path) -> None:
    newest = checkpoint_paths(folder / "server/r")[0]
    newest.write_bytes(newest.read_bytes()[:-20])


def remove_model(folder: Path) -> None:
    (folder / "server/r/models/server_model_001.pt").unlink()


def cut_client(folder: Path) -> None:
    path = folder / "client/r/client_1/models/client_1_001.pt"
    path.write_bytes(path.read_bytes()[:100])


def leave_half_a_checkpoint(folder: Path) -> None:
    (folder / "server/r/checkpoints/round_003.json.tmp").write_bytes(b'{"version": 1')


def lose_lines(folder: Path) -> None:
    """As a loss of power may: what was not synced is not there."""
    for name in ("rounds.csv", "manifest.jsonl"):
        path = folder / "server/r" / name
        path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "first"),
    [(cut, 2), (remove_model, 2), (cut_client, 2), (leave_half_a_checkpoint, 3), (lose_lines, 3)],
)
def test_a_run_goes_on_from_the_newest_round_that_all_have(
    tmp_path: Path, damage: Callable[[Path], None], first: int
) -> None:
    folder, run = tmp_path / "run", OWN_STATE | {"rounds": 2}
    reference(folder, run)
    damage(folder)
    launcher = Launcher(folder)
    server = launcher.server("--resume", folder / "server/r", "--rounds", 4)
    clients = [launcher.client("--client-id", k, *ALLOW) for k in range(2)]
    try:
        for program in (server, *clients):
            program.ended_with(0)
    finally:
        launcher.end()
    assert f"going on with round {first}/4" in clients[0].out
    whole_run = reference(tmp_path / "whole", OWN_STATE | {"rounds": 4})
    found = compare(whole_run, folder / "server/r")
    # What was the last round has figures of the test set.
    was_last = ("server/r/rounds/round_001.csv: differs", "server/r/rounds.csv: differs")
    assert [line for line in found.lines if first < 3 or not line.endswith(was_last)] == []


@pytest.mark.slow
def test_a_run_that_had_not_begun_begins_where_it_lies(launcher: Launcher) -> None:
    server = launcher.server(*options_of(OWN_STATE))
    client = launcher.client("--client-id", 0, *ALLOW)
    wait_for(client, "waiting for 1 of 2 clients")
    send_signal(server, 9)
    server.wait()
    server = launcher.server("--resume", launcher.folder / "server/r")
    for program in (server, client, launcher.client("--client-id", 1, *ALLOW)):
        program.ended_with(0)


def at(step: int, client: int = 0, link: int = 0) -> Position:
    return Position("r", 0, step, client, link)


def test_a_spool_gives_what_it_was_given_until_the_round_is_over(tmp_path: Path) -> None:
    flushed: list[int] = []
    spool = Spool(tmp_path, lambda: flushed.append(1))
    for step in range(3):
        spool.put(at(step), Answer(bytes([step]) * 1000, {"loss": float(step)}, f"crc{step}"))
    spool.put(at(0, client=1), Answer(b"another client", {}))
    spool.put(at(0, link=1), Answer(b"another cut", {}))
    assert spool.get(at(0)) == Answer(b"\0" * 1000, {"loss": 0.0}, "crc0")
    assert spool.get(at(1)) == Answer(b"\1" * 1000, {"loss": 1.0}, "crc1")
    assert spool.get(at(0, link=1)) == Answer(b"another cut", {})
    assert spool.get(at(3)) is None
    assert list(tmp_path.iterdir()) == []  # it has no name, so that nothing is left of it
    (tmp_path / "grads_0_7.pt").write_bytes(b"recorded")
    spool.put(at(7), Answer(b"", {}), recorded=f"{tmp_path}/grads_0_7.pt")
    assert not flushed
    assert spool.get(at(7)) == Answer(b"recorded", {})
    assert flushed
    spool.start_round()
    assert spool.get(at(1)) is None
    spool.put(at(0), Answer(b"new", {}))
    assert spool.get(at(0)) == Answer(b"new", {})
    spool.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leaving: int) -> Path:
    """Take all of a disk but so many bytes."""
    with open(disk / "filler", "wb", buffering=0) as stream:
        with contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        stream.truncate(max(stream.tell() - leaving, 0))
    return disk / "filler"


@pytest.mark.slow
@pytest.mark.parametrize("leaving", [0, 30_000, 150_000])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(
    launcher: Launcher, tmp_path: Path, small_disk: Path, leaving: int
) -> None:
    run = OWN_STATE | {"rounds": 16, "keep_tensors": "last"}
    out = ["--out", small_disk]
    server = launcher.server(*options_of(run), *out)
    clients = [launcher.client("--client-id", k, *ALLOW) for k in range(2)]
    wait_for(server, "round 2/16")
    filler = fill(small_disk, leaving)
    line = server.ended_with(1)
    assert "No space left on device" in line or "the next round takes about" in line
    assert server.out.splitlines()[-1].startswith("go on with: run_server.py --resume")
    filler.unlink()
    server = launcher.server("--resume", small_disk / "server/r", *out)
    for program in (server, *clients):
        program.ended_with(0)
    whole_run = reference(tmp_path / "whole", run)
    found = compare(whole_run, small_disk / "server/r")
    assert [line for line in found.lines if "disk/client/r" not in line] == []  # elsewhere
