"""The specification: runs that must agree, and do so bit for bit."""

import csv
from pathlib import Path

import pytest
import torch

from sfl.config import RunConfig
from sfl.model.segment import Segment
from sfl.nodes import NodeConfig
from sfl.runtime.local_network import LocalLink
from sfl.runtime.simulation import simulate
from sfl.wire.link import Link
from sfl.wire.messages import MessageType
from tests.support.launch import Launcher, in_turns
from tests.support.made_data import write_own
from tests.support.pairwise import pairwise
from tests.support.plain_training import ordinary_training
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, joined, weights

MODELS = {"mlp": 3, "lenet5": 7, BN_DROPOUT: 4}
SGD = ["--optimizer", "sgd", "--lr", "0.05", "--momentum", "0.9", "--weight-decay", "0.001"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "model", "partition", "optimizer", "state"),
    in_turns(pairwise(MODELS, ["iid", "sizes:0.2,0.2,0.6"], ["adam", "sgd"], ["reset", "keep"])),
    indirect=["launcher"],
)
def test_a_socket_run_equals_the_simulation(
    launcher: Launcher, tmp_path: Path, model: str, partition: str, optimizer: str, state: str
) -> None:
    options = ["--model", model, "--cut", MODELS[model], "--partition", partition]
    options += ["--optimizer-state", state, "--rounds", 2, "--batch-size", 64]
    options += SGD if optimizer == "sgd" else []
    allow = ["--allow-import", model] if ":" in model else []
    sockets = launcher.run(*options, "--keep-tensors", "none", client_options=allow)
    chosen = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.001}
    one_process = simulated(
        tmp_path / "simulated",
        model=model,
        cut=MODELS[model],
        partition=partition,
        optimizer_state=state,
        **(chosen if optimizer == "sgd" else {}),
    )
    assert_equal(weights(sockets), weights(one_process))


def test_a_socket_run_writes_what_the_simulation_writes(launcher: Launcher, tmp_path: Path) -> None:
    options = ["--model", BN_DROPOUT, "--cut", 5, "--rounds", 2, "--batch-size", 100]
    sockets = launcher.run(*options, client_options=["--allow-import", BN_DROPOUT])
    one_process = simulated(
        tmp_path / "simulated", model=BN_DROPOUT, cut=5, batch_size=100, keep_tensors="all"
    )
    assert_equal(weights(sockets), weights(one_process))
    assert_same_files(sockets, one_process)


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Assert that two runs wrote the same, apart from times and from who ran them."""
    paths = {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
    assert paths == {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
    of_machine = {"config.json", "environment.json", "server_log.txt", "manifest.jsonl"}
    for path in sorted(paths):
        if path.suffix == ".csv":
            assert untimed(ours / path) == untimed(theirs / path), path
        elif str(path) not in of_machine:
            assert (ours / path).read_bytes() == (theirs / path).read_bytes(), path


def untimed(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows = [row for row in rows if not row.get("metric", "").endswith("_s")]
    return [{n: v for n, v in row.items() if not n.endswith(("_s", "seconds"))} for row in rows]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files_and_another_seed_does_not(tmp_path: Path) -> None:
    first = simulated(tmp_path / "a", model="mlp", seed=7, keep_tensors="all")
    again = simulated(tmp_path / "b", model="mlp", seed=7, keep_tensors="all")
    other = simulated(tmp_path / "c", model="mlp", seed=8, keep_tensors="all")
    assert_same_files(first, again)
    ours, theirs = weights(first), weights(other)
    assert [name for name in ours if torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_a_socket_run_started_twice_writes_the_same_files(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        launcher = Launcher(tmp_path / name)
        runs.append(launcher.run("--model", "mlp", "--rounds", 2, "--seed", 3))
    assert_same_files(*runs)


ONE = {"model": BN_DROPOUT, "clients": 1, "optimizer_state": "keep", "batch_size": 400}


@pytest.fixture(scope="module")
def trained_whole() -> dict[str, torch.Tensor]:
    return ordinary_training(RunConfig(**ONE))


@pytest.mark.parametrize("cut", range(1, 12))
def test_one_client_equals_ordinary_training_whatever_the_cut(
    tmp_path: Path, cut: int, trained_whole: dict[str, torch.Tensor]
) -> None:
    assert_equal(joined(simulated(tmp_path, **ONE, cut=cut)), trained_whole)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_one_client_equals_ordinary_training(tmp_path: Path, model: str) -> None:
    options = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "batch_size": 128}
    options |= {"model": model, "clients": 1, "optimizer_state": "keep"}
    run = simulated(tmp_path, **options)
    assert_equal(joined(run), ordinary_training(RunConfig(**options)), at_least=6)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_sflv1_equals_federated_averaging_of_the_unsplit_model(tmp_path: Path, state: str) -> None:
    """Both halves are averaged after independent training: together, FedAvg of the whole model."""
    options = {"model": BN_DROPOUT, "partition": "sizes:0.2,0.2,0.6", "optimizer_state": state}
    options |= {"batch_size": 200, "local_epochs": 2}
    run = simulated(tmp_path, **options, cut=6)
    assert_equal(joined(run), ordinary_training(RunConfig(**options)))


# (training loss, validation loss) of two rounds, seed 1. A change that should not alter results
# leaves them equal; AVX2 instead of AVX512 moves them by 1e-5 at most.
GOLDEN = {
    "mlp": [(2.039431, 1.439935), (1.191116, 0.818008)],
    "lenet5": [(2.269888, 2.166252), (2.035221, 1.688839)],
    BN_DROPOUT: [(2.324042, 2.212819), (2.012334, 2.036087)],
}


@pytest.mark.parametrize("model", list(GOLDEN))
def test_the_golden_losses_are_equal(tmp_path: Path, model: str) -> None:
    run = simulated(tmp_path, model=model, cut=MODELS[model], batch_size=256, seed=1, lr=0.002)
    rows = csv.DictReader((run / "rounds.csv").read_text().splitlines())
    losses = [(float(row["train_loss"]), float(row["val_loss"])) for row in rows]
    assert losses == [pytest.approx(golden, abs=1e-4) for golden in GOLDEN[model]]


def test_gradients_are_sent_before_the_back_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from the client: when its gradients are there, the back has not moved."""

    order: list[str] = []
    update = Segment.update

    def note_update(segment: Segment) -> None:
        order.append("front" if segment._first_block == 0 else "back")
        update(segment)

    def send_file(
        link: LocalLink, message_type: MessageType, *rest: object, **more: object
    ) -> None:
        order.append(message_type.value)
        Link.send_file(link, message_type, *rest, **more)

    monkeypatch.setattr(Segment, "update", note_update)
    monkeypatch.setattr(LocalLink, "send_file", send_file)
    simulated(tmp_path, model="mlp", clients=1, rounds=1, batch_size=2000)
    start = order.index("TRAINING_GRADS")
    assert order[start - 2 : start + 3] == [
        "TRAINING_LABELS", "TRAINING_FEATURES", "TRAINING_GRADS", "back", "front",
    ]  # fmt: skip


def test_a_run_on_private_data_equals_the_simulation(launcher: Launcher, tmp_path: Path) -> None:
    folders = [write_own(tmp_path / f"client_{k}", count=60 + 40 * k) for k in range(2)]
    options = ["--partition", "own", "--model", "mlp", "--rounds", 2, "--batch-size", 16]
    server = launcher.server("--clients", 2, "--run", "r", *options)
    for k, folder in enumerate(folders):
        launcher.client("--client-id", k, "--data-dir", folder)
    for program in launcher.programs:
        program.ended_with(0)
    assert "client_1 is ready: 80 train, 20 validation, 0 test samples" in server.out
    run = RunConfig(partition="own", model="mlp", rounds=2, batch_size=16, clients=2, run="s")
    one_process = simulate(run, NodeConfig(out=str(tmp_path), data_dir=str(tmp_path)))
    assert_equal(weights(tmp_path / "server" / "r"), weights(one_process))
