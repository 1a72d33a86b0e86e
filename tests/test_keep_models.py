"""``--keep-models``: what is not needed any more goes; what stays is gone on with, and replayed."""

import re
from pathlib import Path

import pytest

from sfl.archive.checkpoint import checkpoint_paths
from sfl.archive.layout import MODELS
from sfl.archive.manifest import DROPPED, read_manifest
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.nodes import NodeConfig
from sfl.runtime import replay
from sfl.runtime.local_network import Away
from sfl.runtime.recorded_run import load
from sfl.runtime.simulation import simulate
from sfl.values import KeepModels
from tests.support.launch import Launcher, finish
from tests.support.runs import start_all
from tests.support.weights import weights

ROUNDS = 6
FAST = {"model": "mlp", "batch_size": 400, "clients": 2, "rounds": ROUNDS, "run": "r"}


def run(out: Path, away: str = "", **options: object) -> Path:
    config = RunConfig(**FAST | options)  # type: ignore[arg-type]
    return simulate(config, NodeConfig(out=str(out)), [Away.parse(away)] if away else [])


def rounds_of(folder: Path) -> list[int]:
    """Return of which rounds a folder has models; -1: the initial ones."""
    names = (path.stem.rpartition("_")[2] for path in (folder / "models").glob("*.pt"))
    return sorted({-1 if name == "init" else int(name) for name in names})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "tensors", "kept"),
    [
        ("all", "none", [-1, 0, 1, 2, 3, 4, 5]),
        ("last", "none", [4, 5]),  # what the two checkpoints start from
        ("last", "last", [4, 5]),
        ("every:3", "none", [0, 3, 4, 5]),
        ("last", "every:3", [-1, 0, 2, 3, 4, 5]),  # before and after the rounds 0 and 3
        ("every:3", "every:2", [-1, 0, 1, 2, 3, 4, 5]),
        ("last", "all", [-1, 0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_stays_can_be_replayed(
    tmp_path: Path, models: str, tensors: str, kept: list[int]
) -> None:
    folder = run(tmp_path, keep_models=models, keep_tensors=tensors)
    assert rounds_of(folder) == kept
    dropped = {e.path for e in read_manifest(folder) if e.kind == DROPPED}
    assert not any((folder / path).exists() for path in dropped)
    assert all((folder / name).exists() for e in load(folder).archive.listed for name in [e.path])
    report = replay.check(load(folder))
    assert report.findings == []
    steps = len(list(folder.glob("client_files/*/*/grads_*.pt")))
    assert report.summary == f"{steps} gradients checked, 0 differ"
    whole = [r for r in range(ROUNDS) if {r - 1, r} <= set(kept)]
    assert report.dropped == ROUNDS - len(whole)
    assert report.models >= len(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": "fedadam:lr=0.01", "keep_tensors": "none"},
            {"optimizer_state": "keep", "keep_tensors": "last"},
            {"scheme": "sl", "keep_tensors": "none"},
        {"scheme": "sync-sgd", "keep_tensors": "every:3"}, {"scheme": "fl"},
    ],
)  # fmt: skip
def test_what_stays_is_what_it_was(tmp_path: Path, options: dict[str, object]) -> None:
    ours = run(tmp_path / "ours", keep_models="last", **options)
    whole = run(tmp_path / "whole", **options)
    found, every = weights(ours), weights(whole)
    assert found
    assert all(found[name].equal(every[name]) for name in found)
    assert len(found) < len(every)
    assert replay.check(load(ours)).findings == []


def test_a_clients_own_models_go_as_well(tmp_path: Path) -> None:
    options = {"scheme": "sflv3", "optimizer_state": "keep", "keep_tensors": "none"}
    run(tmp_path, keep_models="last", **options)
    own = tmp_path / "client/r/client_0"
    assert rounds_of(own) == [4, 5]
    assert all(any(p.name.startswith(n) for p in (own / "models").iterdir())
               for n in ("client_0_", "client_optimizer_0_"))  # fmt: skip


def test_a_client_that_was_away_keeps_what_its_checkpoints_name(tmp_path: Path) -> None:
    """Its last two are of rounds that lie apart."""
    options = {"scheme": "sflv3", "keep_tensors": "none", "keep_models": "last"}
    run(tmp_path, away="1:2-5", **options)
    own = tmp_path / "client/r/client_1"
    assert [path.name for path in checkpoint_paths(own)] == ["round_006.json", "round_002.json"]
    assert rounds_of(own) == [1, 5]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sflv1", "sflv3"])
def test_a_run_that_goes_on_does_so_from_what_stayed(
    launcher: Launcher, tmp_path: Path, scheme: str
) -> None:
    options = ["--model", "mlp", "--batch-size", 400, "--scheme", scheme, "--keep-models", "last"]
    folder = launcher.run(*options, "--optimizer-state", "keep", "--rounds", 3, clients=2)
    assert rounds_of(folder) == [-1, 0, 1, 2]  # replaying the tensors takes them
    server = launcher.server("--resume", folder, "--rounds", ROUNDS)
    finish([server, *(launcher.client("--client-id", k) for k in range(2))])
    whole = run(tmp_path / "whole", scheme=scheme, optimizer_state="keep")
    last = [n for n in weights(whole) if re.search(r"_005\.pt", n)]
    assert last
    assert all(weights(folder)[name].equal(weights(whole)[name]) for name in last)
    assert replay.check(load(folder)).findings == []


def test_models_of_before_a_restart_go_too(launcher: Launcher) -> None:
    options = ["--model", "mlp", "--batch-size", 400, "--keep-tensors", "none"]
    folder = launcher.run(*options, "--keep-models", "last", "--rounds", 2, clients=1)
    assert rounds_of(folder) == [0, 1]
    server = launcher.server("--resume", folder, "--rounds", 4)
    finish([server, launcher.client("--client-id", 0)])
    assert rounds_of(folder) == [2, 3]
    assert all(e.kind == DROPPED for e in read_manifest(folder)[-4:] if e.path.startswith(MODELS))


@pytest.mark.slow
def test_a_fed_server_keeps_one_round_more(launcher: Launcher) -> None:
    """The main server may go back to the round before its last."""
    options = ["--model", "mlp", "--batch-size", 400, "--rounds", 6, "--keep-models", "last"]
    servers, clients = start_all(
        launcher, "socket", *options, "--keep-tensors", "none", apart=True, clients=2
    )
    finish([*servers, *clients])
    assert rounds_of(launcher.folder / "fed/r") == [3, 4, 5]
    assert rounds_of(launcher.folder / "server/r") == [4, 5]
    assert replay.check(load(launcher.folder / "fed/r")).findings == []


@pytest.mark.parametrize("text", ["none", "every:0", "every:x", "some", "last:2"])
def test_what_is_none_of_them_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--keep-models .*: give all, last, every:N or best"):
        KeepModels.parse(text)
