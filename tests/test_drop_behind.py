"""Tensors that were archived a while ago leave the page cache, and no file stays open."""

import os
from pathlib import Path

import pytest
import torch

from sfl.archive import ACTIVATIONS, GRADS, LABELS
from sfl.archive_writer import ArchiveWriter
from sfl.config import KeepTensors
from sfl.drop_behind import GROUP, MIN_BYTES
from sfl.protocol import File
from sfl.tensors import TensorSpec, encode_file

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "posix_fadvise") and Path("/proc/self/fd").exists()), reason="Linux only"
)

NUM_STEPS = 20  # of two large files each: two groups, and half of one


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2].removesuffix(".tmp")


def num_open(folder: Path) -> int:
    """Return how many files of tensors this process holds open."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(path))
        except FileNotFoundError:
            continue
    links = [link.removesuffix(" (deleted)") for link in links]
    return sum(link.startswith(str(folder)) and link.endswith(".pt") for link in links)


def step_of(num_floats: int) -> dict[str, tuple[File, TensorSpec]]:
    labels, floats = torch.zeros(4, dtype=torch.int64), torch.zeros(num_floats)
    tensors = {LABELS: labels, ACTIVATIONS: floats, GRADS: floats}
    return {k: (encode_file(t), TensorSpec.of(t)) for k, t in tensors.items()}


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that the page cache was told to forget, in that order."""
    names: list[str] = []
    advise = os.posix_fadvise

    def record(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # all of it
        names.append(name_of(descriptor))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", record)
    return names


def test_large_tensors_leave_in_groups_each_when_the_next_is_on_its_way(
    tmp_path: Path, advised: list[str]
) -> None:
    step = step_of(MIN_BYTES // 4)
    with ArchiveWriter(tmp_path, KeepTensors.parse("all")) as writer:
        for index in range(NUM_STEPS):
            writer.record_step(step, {"client": 0, "round": 0, "step": index, "order": index})
        writer.flush()
        written = [f"{k}_0_{i}.pt" for i in range(NUM_STEPS) for k in (ACTIVATIONS, GRADS)]
        first, second, rest = (written[i : i + GROUP] for i in range(0, 2 * NUM_STEPS, GROUP))
        # No labels: they are small.
        assert advised[:GROUP] == first
        assert sorted(advised[GROUP : 2 * GROUP]) == sorted(first)
        assert advised[2 * GROUP :] == second
        assert num_open(tmp_path) == len(second) + len(rest)
        writer.end_round(0)
        writer.flush()
        assert num_open(tmp_path) == 0
        writer.record_step(step, {"client": 0, "round": 1, "step": 0, "order": 0})
        writer.flush()
        assert num_open(tmp_path) == 2
        writer.drop_steps(0, 1)
        writer.flush()
        assert num_open(tmp_path) == 0
        writer.record_step(step, {"client": 0, "round": 1, "step": 0, "order": 0})
    assert num_open(tmp_path) == 0
    folder = tmp_path / "client_files" / "client_0" / "round_000"
    assert torch.load(folder / written[0], weights_only=True).shape == (MIN_BYTES // 4,)


def test_what_cannot_be_forgotten_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with ArchiveWriter(tmp_path, KeepTensors.parse("all")) as writer:
        for index in range(NUM_STEPS):
            at = {"client": 0, "round": 0, "step": index, "order": index}
            writer.record_step(step_of(MIN_BYTES // 4), at)
        writer.flush()
    assert num_open(tmp_path) == 0
    assert len(list(tmp_path.glob("client_files/client_0/round_000/*.pt"))) == 3 * NUM_STEPS
