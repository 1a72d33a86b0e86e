"""What a real run puts on the wire, seen by a proxy between clients and server."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from sfl.config import RunConfig
from sfl.data.client_data import part_of
from sfl.data.datasets import DATASETS
from sfl.data.samples import Samples
from sfl.files.torch_file import owns_storage
from sfl.wire.framing import encode_head
from sfl.wire.messages import FILE_TYPES, MessageType
from tests.support.made_data import loaded
from tests.support.proxy import DOWN, UP, Recorded
from tests.support.wiretap import record

ROUNDS, CLIENTS, BATCH = 2, 2, 64
STEP = [
    (UP, MessageType.TRAINING_LABELS),
    (UP, MessageType.TRAINING_FEATURES),
    (DOWN, MessageType.TRAINING_GRADS),
]


@pytest.fixture(scope="module", params=["tcp", "ws"])
def recorded(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, list[Recorded]]:
    """Run two clients through a proxy; return the run's folder and what passed."""
    if request.param == "ws":
        pytest.importorskip("websockets")
    options = ["--rounds", ROUNDS, "--batch-size", BATCH]
    folder = tmp_path_factory.mktemp("wire")
    return record(folder, CLIENTS, options, transport=request.param)


@pytest.mark.slow
def test_a_training_step_is_one_round_trip_and_three_files(
    recorded: tuple[Path, list[Recorded]],
) -> None:
    _, connections = recorded
    assert len(connections) == CLIENTS
    for connection in connections:
        kinds = [(way, message.type) for way, message in connection.messages]
        steps = [kind for kind in kinds if kind[1] in {k for _, k in STEP}]
        num_steps = len(steps) // 3
        assert steps == STEP * num_steps
        assert num_steps == ROUNDS * 25  # 1,600 training samples
        # Nothing else passes from the first step of a round to its last.
        for r in range(ROUNDS):
            first = next(
                i for i, (_, m) in enumerate(connection.messages)
                if m.type == MessageType.TRAINING_LABELS and m.at.round == r
            )  # fmt: skip
            assert kinds[first : first + 75] == STEP * 25


def test_bytes_on_the_wire_are_at_most_five_percent_over_the_files(
    recorded: tuple[Path, list[Recorded]],
) -> None:
    run, connections = recorded
    files = sum(path.stat().st_size for path in run.glob("client_files/*/*/*.pt"))
    training = {kind for _, kind in STEP}
    payloads = sum(len(m.payload) for c in connections for _, m in c.messages if m.type in training)
    assert payloads == files
    total = sum(c.num_raw for c in connections)
    all_files = sum(
        len(m.payload) for c in connections for _, m in c.messages if m.type in FILE_TYPES
    )
    assert all_files < total <= 1.05 * all_files


def test_steps_of_large_tensors_cost_at_most_two_percent_over_their_numbers(tmp_path: Path) -> None:
    options = ["--model", "mlp", "--rounds", 1, "--batch-size", 512]
    _, [connection] = record(tmp_path, 1, options)
    numbers = wire = 0
    for _, message in connection.messages:
        if message.type in {kind for _, kind in STEP} and message.at.step < 6:  # whole batches
            tensor = torch.load(io.BytesIO(message.payload), weights_only=True)
            assert message.type == MessageType.TRAINING_LABELS or tensor.nbytes == 256 * 1024
            numbers += tensor.nbytes
            wire += len(encode_head(message)) + len(message.payload)
    assert numbers == 6 * 512 * (8 + 2 * 4 * 128)
    assert numbers < wire <= 1.02 * numbers


PARTS = {
    "labels": MessageType.TRAINING_LABELS,
    "activations": MessageType.TRAINING_FEATURES,
    "gradients": MessageType.TRAINING_GRADS,
}


def test_the_counters_are_exact(recorded: tuple[Path, list[Recorded]]) -> None:
    """rounds.csv counts from START_TRAINING to VALIDATION_DONE."""
    run, connections = recorded
    rows = list(csv.DictReader((run / "rounds.csv").read_text().splitlines()))
    for round_index, row in enumerate(rows):
        of_round = [
            (way, len(encode_head(m)) + len(m.payload))
            for c in connections
            for way, m in c.messages
            if m.at.round == round_index
        ]
        assert int(row["messages_up"]) == sum(way == UP for way, _ in of_round)
        assert int(row["messages_down"]) == sum(way == DOWN for way, _ in of_round)
        for way, column in ((UP, "bytes_up"), (DOWN, "bytes_down")):
            assert int(row[column]) == sum(size for w, size in of_round if w == way)
            parts = {n: int(v) for n, v in row.items() if n.startswith(f"{column}_")}
            assert sum(parts.values()) == int(row[column])
            for n, wanted in PARTS.items():
                of_kind = [
                    len(encode_head(m)) + len(m.payload)
                    for c in connections
                    for w, m in c.messages
                    if m.at.round == round_index and w == way and m.type == wanted
                ]
                assert parts.get(f"{column}_{n}", 0) == sum(of_kind), n
        # One for each step and each batch of validation and test, three for the round's weights
        # (offered and sent, both ways), one for the initial weights.
        batches = sum(
            m.type == MessageType.VALIDATION_LABELS and m.at.round == round_index
            for c in connections
            for _, m in c.messages
        )
        assert int(row["round_trips"]) == CLIENTS * (25 + 3 + (round_index == 0)) + batches
    for connection in connections:  # frames are what the messages encode to, and nothing else
        for way, stream in connection.streams.items():
            frames = [encode_head(m) + m.payload for w, m in connection.messages if w == way]
            assert b"".join(frames) == stream


def test_the_initial_weights_are_offered_and_not_sent(
    recorded: tuple[Path, list[Recorded]],
) -> None:
    _, connections = recorded
    for connection in connections:
        before = [m for _, m in connection.messages if m.at.round == -1]
        offered = [m for m in before if m.type == MessageType.REQUEST_TO_SEND_FILE]
        answers = [m for m in before if m.type == MessageType.SEND_FILE]
        assert [m.get("offset", int) for m in answers] == [m.get("bytes", int) for m in offered]
        assert len(offered) == 1
        assert not any(m.payload for m in before)


@pytest.mark.slow
def test_raw_data_never_leave_the_client(recorded: tuple[Path, list[Recorded]]) -> None:
    _, connections = recorded
    spec = DATASETS["mnist-5k"]
    both = loaded("mnist-5k")
    found = searched = 0
    for k in range(CLIENTS):
        data = part_of(spec, RunConfig(clients=CLIENTS), k, both)
        streams = [bytes(connection.streams[UP]) for connection in connections]
        for samples in (data.train, data.validation, data.test):
            for image in raw_rows(data.batch(samples, slice(0, 40))[0], samples):
                searched += 1
                found += sum(image in stream for stream in streams)
    assert searched == CLIENTS * 3 * 40 * 2
    assert found == 0


def raw_rows(x: torch.Tensor, samples: Samples) -> list[bytes]:
    """Return three rows of each image as they would lie in a file: as read, and normalised."""
    normalised = [image[0, 12:15].numpy().tobytes() for image in x]
    return normalised + [image[0, 12:15].numpy().tobytes() for image in samples.x[: len(x)]]


def test_the_search_for_raw_data_would_find_them() -> None:
    """With the cut behind ``flatten`` the activations of an mlp are the images themselves."""
    spec = DATASETS["mnist-5k"]
    data = part_of(spec, RunConfig(), 0, loaded("mnist-5k"))
    x, _ = data.batch(data.train, slice(0, 40))
    leaked = np.ascontiguousarray(torch.nn.Flatten()(x).numpy()).tobytes()
    rows = raw_rows(x, data.train)
    assert sum(row in leaked for row in rows[:40]) == 40


def test_every_files_tensor_owns_its_storage(recorded: tuple[Path, list[Recorded]]) -> None:
    run, _ = recorded
    paths = [*run.glob("client_files/*/*/*.pt"), *run.glob("models/*.pt")]
    assert len(paths) > 300
    for path in paths:
        content = torch.load(path, weights_only=True)
        tensors = content.values() if isinstance(content, dict) else [content]
        assert all(owns_storage(tensor) for tensor in tensors), path


def test_what_is_on_disk_is_what_passed(recorded: tuple[Path, list[Recorded]]) -> None:
    run, connections = recorded
    kinds = {
        MessageType.TRAINING_LABELS: "labels",
        MessageType.TRAINING_FEATURES: "split_layer_tensor",
        MessageType.TRAINING_GRADS: "grads",
    }
    compared = 0
    for connection in connections:
        for _, m in connection.messages:
            if m.type in kinds:
                folder = run / "client_files" / f"client_{m.at.client}" / f"round_{m.at.round:03d}"
                path = folder / f"{kinds[m.type]}_{m.at.round}_{m.at.step}.pt"
                assert path.read_bytes() == m.payload
                compared += 1
    assert compared == len(list(run.glob("client_files/*/*/*.pt")))
