"""Runs of models with several cuts: over sockets, from their files, and what passes on the wire."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import sfl.archive
from sfl.archive.layout import ACTIVATIONS, GRADS
from sfl.archive.writer import ArchiveWriter, Tensors
from sfl.config import RunConfig
from sfl.conversation import join, report
from sfl.conversation.limits import client_limits, server_limits
from sfl.conversation.report import DataReport
from sfl.data.client_data import batch_indices
from sfl.errors import DataError, ProtocolError, RunError
from sfl.model.topology import TOPOLOGIES, Holder, Topology
from sfl.nodes import ServerNode
from sfl.runtime.recorded_run import load
from sfl.runtime.replay import check
from sfl.runtime.report_limits import claim_error
from sfl.runtime.same_model import report_of
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position
from sfl.wire.messages import MessageType
from sfl.wire.payload import InMemory
from tests.support.launch import Launcher
from tests.support.pairwise import pairwise
from tests.support.plain_training import data_of, ordinary_training
from tests.support.proxy import DOWN, UP, Recorded
from tests.support.runs import ALLOW, BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import all_weights, assert_equal, joined
from tests.support.wiretap import record

# With BatchNorm and dropout at both parties: u-shaped, three cuts, four cuts.
CUTS = ["3,9", "3,6,9", "2,5,7,10"]
MODEL = {"model": BN_DROPOUT, "batch_size": 200}
SCHEMES = ["sl", "sflv1", "sflv2", "sflv3"]
SOCKETS = pairwise(CUTS, SCHEMES, ["reset", "keep"])


@pytest.mark.parametrize(("cut", "scheme", "state"), SOCKETS)
def test_one_client_equals_the_unsplit_model(
    tmp_path: Path, cut: str, scheme: str, state: str
) -> None:
    options = MODEL | {"clients": 1, "optimizer_state": state}
    run = simulated(tmp_path, **options, cut=cut, scheme=scheme)
    own = joined(tmp_path / "client/r/client_0", kind="client_0") if scheme == "sflv3" else {}
    assert_equal(own | joined(run), ordinary_training(RunConfig(**options)))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "optimizer"), [("sl", "sgd"), ("sflv1", "adam")])
def test_schemes_of_whole_models_do_not_see_the_cuts(
    tmp_path: Path, scheme: str, optimizer: str
) -> None:
    """The whole model is relayed, or averaged, wherever it is cut.

    In a relay each party's Adam would know its own clients' steps alone; plain SGD knows none.
    """
    options = MODEL | {"scheme": scheme, "clients": 2, "optimizer": optimizer, "lr": 0.01}
    one, *others = [simulated(tmp_path / str(cut), **options, cut=cut) for cut in (6, *CUTS)]
    for run in others:
        assert_equal(joined(run), joined(one))


@pytest.mark.parametrize(("cut", "scheme", "state"), SOCKETS)
def test_sockets_equal_the_simulation_and_the_replay(
    launcher: Launcher, tmp_path: Path, cut: str, scheme: str, state: str
) -> None:
    options = MODEL | {"cut": cut, "scheme": scheme, "optimizer_state": state, "clients": 2}
    typed = [text for n, v in options.items() for text in (f"--{n.replace('_', '-')}", v)]
    sockets = launcher.run(*typed, "--rounds", 2, clients=2, client_options=ALLOW)
    whole = simulated(tmp_path / "simulated", **options, keep_tensors="all")
    assert_equal(all_weights(sockets), all_weights(whole))
    files = {p.relative_to(whole) for p in whole.glob("client_files/**/*.pt")}
    assert len(files) == 2 * len(cut.split(",")) * 2 * 2 * 8 + (cut.count(",") == 2) * 32
    assert all((whole / p).read_bytes() == (sockets / p).read_bytes() for p in files)
    report = check(load(sockets, allow_import=BN_DROPOUT))
    assert (report.findings, report.checked, report.differ) == ([], 32, 0)
    assert report.models > 0
    assert report.models_differ == 0


@pytest.mark.parametrize("cut", [6, "3,9"])
def test_clients_that_come_in_turns_are_served_in_turns(tmp_path: Path, cut: int | str) -> None:
    """With ``--server-order arrival`` nobody keeps the shared back between two steps."""
    options = MODEL | {"scheme": "sflv2", "server_order": "arrival", "clients": 3, "rounds": 1}
    run = simulated(tmp_path, **options, cut=cut, keep_tensors="all")
    steps = [step for step in sfl.archive.open(run).steps() if step.link == 0]
    assert [step.step for step in steps] == sorted(step.step for step in steps)
    assert len(steps) == 18


def test_a_shared_back_is_one_clients_for_a_whole_step(launcher: Launcher) -> None:
    """Also where clients take their steps as they come, and each step waits for its client."""
    options = ["--model", BN_DROPOUT, "--cut", "3,9", "--batch-size", 50, "--rounds", 1]
    order = ["--scheme", "sflv2", "--server-order", "arrival"]
    run = launcher.run(*options, *order, clients=3, client_options=ALLOW)
    report = check(load(run, allow_import=BN_DROPOUT))
    assert (report.findings, report.checked, report.differ) == ([], 66, 0)


@pytest.mark.parametrize("kind", [ACTIVATIONS, GRADS])
@pytest.mark.parametrize("link", [0, 1])
def test_a_tensor_that_was_changed_is_found_whichever_cut_it_crossed(
    tmp_path: Path, kind: str, link: int
) -> None:
    """The server's own are recomputed; the manifest vouches for the others."""
    run = simulated(tmp_path, **MODEL, cut="3,9", clients=1, rounds=1, keep_tensors="all")
    mark = f"_{link}" if link else ""
    path = run / f"client_files/client_0/round_000/{kind}_0_3{mark}.pt"
    torch.save(torch.load(path) + 1, path)
    report = check(load(run, allow_import=BN_DROPOUT))
    assert path.name in "".join(report.findings)
    assert report.differ or report.unchecked


def test_a_step_that_a_run_ended_in_is_incomplete_and_not_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is broken off between the records of the step's two cuts."""
    record_step = ArchiveWriter.record_step

    def ends(writer: ArchiveWriter, tensors: Tensors, at: Position, order: int) -> None:
        if writer.records(at.round) and (at.step, at.link) == (3, 1):
            raise RunError("broken off")
        record_step(writer, tensors, at, order)

    monkeypatch.setattr(ArchiveWriter, "record_step", ends)
    options = MODEL | {"cut": "3,9", "clients": 1, "rounds": 1, "keep_tensors": "all"}
    with pytest.raises(RunError, match="broken off"):
        simulated(tmp_path, **options)
    report = check(load(tmp_path / "server/r", allow_import=BN_DROPOUT))
    assert (report.findings, report.checked, report.differ, report.incomplete) == ([], 3, 0, 1)


def test_a_topology_that_is_not_listed_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments at the server, each with its own files and clipping."""
    row = Topology("a test", lambda _: [Holder.CLIENT, Holder.SERVER, Holder.SERVER], range(2, 3))
    monkeypatch.setitem(TOPOLOGIES, "two-at-the-server", row)
    options = MODEL | {"clients": 1, "optimizer_state": "keep", "topology": "two-at-the-server"}
    run = simulated(tmp_path, **options, cut="3,9", keep_tensors="all")
    assert_equal(
        joined(run), ordinary_training(RunConfig(**MODEL, clients=1, optimizer_state="keep"))
    )
    assert sorted(p.name for p in run.glob("models/*_001.pt")) == [
        "client_0_001.pt", "client_model_001.pt", "server_head_001.pt", "server_model_001.pt",
        "server_optimizer_0_001.pt", "server_optimizer_0_head_001.pt",
    ]  # fmt: skip
    assert check(load(run, allow_import=BN_DROPOUT)).summary == "32 gradients checked, 0 differ"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Recorded]]:
    """A u-shaped run of two clients; what passed between clients and server."""
    folder = tmp_path_factory.mktemp("private")
    options = ["--model", BN_DROPOUT, "--cut", "3,9", "--rounds", 2, "--batch-size", 64]
    return record(folder, 2, options, ALLOW)


def told(connections: Sequence[Recorded], run: RunConfig) -> list[str]:
    """Return what passes from clients to server that tells labels."""
    found = []
    for connection in connections:
        client = next(m.at.client for _, m in connection.messages if m.at.client >= 0)
        data = data_of(run)[client]
        stream = bytes(connection.streams[UP])
        for indices in batch_indices(len(data.train), run, round_index=0, client=client):
            y = data.train.y[indices]
            if any(
                y.to(t).numpy().tobytes() in stream for t in (torch.int64, torch.int32, torch.uint8)
            ):
                found.append("labels of a batch")
        for way, message in connection.messages:
            if way == UP and message.type in LABELS:
                found.append(str(message.type))
            content = message.content if way == UP and isinstance(message.content, dict) else {}
            lists = {name for name, value in content.items() if isinstance(value, list) and value}
            found += lists - DESCRIPTION
            if "loss" in content or "loss_sum" in content:
                size = content.get("samples", run.batch_size)
                found += ["a sample's loss"] if size == 1 else []
    return sorted(set(found))


DESCRIPTION = {"classes", "input_shape", "structure", "rounds"}  # of a client's data and model
INTEGERS = torch.int64, torch.int32, torch.uint8
LABELS = {MessageType.TRAINING_LABELS, MessageType.VALIDATION_LABELS}
STEP = {MessageType.TRAINING_FEATURES, MessageType.TRAINING_GRADS}


def test_no_label_leaves_a_client_that_holds_the_last_segment(
    private: tuple[Path, list[Recorded]],
) -> None:
    run, connections = private
    assert told(connections, RunConfig(clients=2, batch_size=64)) == []
    assert not list(run.rglob("labels_*.pt"))
    assert not list(run.rglob("predictions/*"))
    header, *rows = (run / "rounds.csv").read_text().splitlines()
    figures = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(figures["val_acc"]) > 0.2
    assert figures["val_macro_f1"] == ""


def test_a_step_of_two_cuts_is_two_round_trips(private: tuple[Path, list[Recorded]]) -> None:
    _, connections = private
    step = [
        (UP, MessageType.TRAINING_FEATURES, 0),
        (DOWN, MessageType.TRAINING_FEATURES, 1),
        (UP, MessageType.TRAINING_GRADS, 1),
        (DOWN, MessageType.TRAINING_GRADS, 0),
    ]
    for connection in connections:
        passed = [(w, m.type, m.at.link) for w, m in connection.messages if m.type in STEP]
        assert passed == step * (len(passed) // 4)
        assert len(passed) == 4 * 2 * 25  # rounds, batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "client_options", "wanted"),
    [
        (["--cut", 6], [], ["TRAINING_LABELS", "VALIDATION_LABELS", "labels of a batch"]),
        (["--cut", "3,9"], ["--share-figures"], ["per_class"]),
        (["--scheme", "fl", "--cut", 6], [], ["per_class"]),
        (["--scheme", "fl", "--cut", 6], ["--keep-labels"], []),
        (["--scheme", "sync-sgd", "--cut", 6], ["--keep-labels"], []),
    ],
)
def test_the_search_for_labels_finds_those_that_are_told(
    tmp_path: Path, options: list[object], client_options: list[object], wanted: list[str]
) -> None:
    own = [*options, "--model", BN_DROPOUT, "--rounds", 1, "--batch-size", 64]
    _, connections = record(tmp_path, 2, own, [*ALLOW, *client_options])
    found = told(connections, RunConfig(clients=2, batch_size=64))
    assert [re.sub(".*\\.", "", name) for name in found] == wanted


def test_the_figures_of_a_single_sample_are_not_told(tmp_path: Path) -> None:
    """Of 6 samples one is for validation; and a single sample is not trained on."""
    options = MODEL | {"cut": "3,9", "clients": 2, "rounds": 1, "partition": "sizes:0.0015,0.9985"}
    run = simulated(tmp_path, **options)
    rows = (run / "rounds/round_000.csv").read_text().splitlines()
    figures = {tuple(r.split(",")[:1] + r.split(",")[2:3]): r.split(",")[3] for r in rows}
    assert float(figures["0", "samples"]) == 5
    assert ("0", "val_acc") not in figures
    assert ("1", "val_acc") in figures


def test_a_single_sample_is_not_trained_on_where_its_loss_would_tell_its_label(
    tmp_path: Path,
) -> None:
    """The client refuses to report it, and the server to accept such a report."""
    data = data_of(RunConfig(clients=1))[0]
    data = dataclasses.replace(data, train=data.train.take(torch.tensor([0])))
    report = report_of(
        data, SplitModel(Recipe.of(RunConfig()), (1, 28, 28), 10), shares_figures=False
    )
    told, node = join.Joined(0, None, {}, report), ServerNode(out=str(tmp_path))
    fl = RunConfig(scheme="fl")
    private = Recipe.of(RunConfig(cut="3,9"))
    for recipe in (private, Recipe.of(fl, withholds_labels=True)):
        with pytest.raises(DataError, match="a single training sample: its loss would be sent"):
            report_of(data, SplitModel(recipe, (1, 28, 28), 10), shares_figures=False)
    assert "reports a single training sample" in claim_error(private, node, told)
    report_of(data, SplitModel(Recipe.of(fl), (1, 28, 28), 10), shares_figures=False)
    assert claim_error(Recipe.of(fl), node, told) == ""


def test_a_client_takes_no_weights_of_classes_that_would_pick_its_labels_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one class weighed above all others, a batch's loss would tell who is of it."""
    monkeypatch.setattr(report, "class_weights", lambda *_: (1e6, *[1e-6] * 9))
    with pytest.raises(ProtocolError, match="are not those of --class-weights"):
        simulated(tmp_path, **MODEL, cut="3,9", clients=1, rounds=1)


def test_limits_are_those_of_what_a_party_receives() -> None:
    recipe = Recipe.of(RunConfig(model="lenet5", cut="3,9"))
    split = SplitModel(recipe, (1, 28, 28), 10)
    server = server_limits(split, 1, InMemory).payload_bytes
    client = client_limits(split, InMemory).payload_bytes
    assert MessageType.TRAINING_LABELS not in server
    assert server[MessageType.TRAINING_FEATURES] > server[MessageType.TRAINING_GRADS]
    assert client[MessageType.TRAINING_GRADS] > client[MessageType.TRAINING_FEATURES]
    assert MessageType.VALIDATION_FEATURES in client


def test_the_digest_of_a_clients_data_tells_no_label_that_stays() -> None:
    run = RunConfig(clients=1)
    data = data_of(run)[0]
    before = DataReport.of(data, run).digest, DataReport.of(data, run, keeps_labels=True).digest
    data.train.y[0] = (data.train.y[0] + 1) % 10
    assert DataReport.of(data, run).digest != before[0]
    assert DataReport.of(data, run, keeps_labels=True).digest == before[1]
    assert DataReport.of(data, run, passes_hops=True).digest == before[1]  # hops read it
