"""Tensors between host and device: bit for bit the same, and no copies on a CPU."""

from pathlib import Path

import pytest
import torch

from experiments.support.same_run import compare
from sfl.conversation import cut
from sfl.conversation.party import Party
from sfl.files.torch_file import TensorSpec, are_finite, identical
from sfl.model import transfer
from sfl.model.task import TASKS
from sfl.model.transfer import Numbers, to_device, to_host
from tests.support.regression import REGRESSION
from tests.support.simulations import simulated

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_on_a_cpu_nothing_is_copied() -> None:
    z = torch.rand(4, 3)
    assert to_device(z, CPU) is z
    assert to_host(z).data_ptr() == z.data_ptr()
    assert not to_host(z.requires_grad_()).requires_grad


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_a_gpu_gets_and_gives_back_the_same_bits(dtype: torch.dtype) -> None:
    for n in range(20):  # in turn: buffers are used again
        z = (1000 * torch.randn(3, 1000 + n)).to(dtype)
        for given in (z, z.T):
            found = to_host(to_device(given, GPU))
            assert found.device == CPU
            assert identical(found.contiguous(), given.contiguous())


@needs_gpu
def test_a_gpu_is_waited_for_once() -> None:
    values = [torch.tensor(n / 3, device=GPU) for n in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            values[0].item()
        copied = to_host(values[1])  # a wait that is meant
        assert transfer.are_finite(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Numbers([*values, 7]).wait() == [*(v.item() for v in values), 7]
    assert copied.item() == values[1].item()


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
def test_figures_are_python_numbers_whether_a_task_counts_in_tensors_or_not(
    device: torch.device,
) -> None:
    outputs = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]], device=device)
    y = torch.tensor([1, 0, 0], device=device)
    task = TASKS["classification"]
    loss = task.loss(outputs, y)
    figures = task.step_figures(outputs, y, loss)
    assert (figures.loss, figures.counts, figures.samples) == (loss.item(), (2,), 3)
    assert type(figures.loss) is float
    assert {type(count) for count in figures.counts} == {int}
    tally = task.tally(outputs, y)
    assert (tally.counts, type(tally.counts[0]), type(tally.loss_sum)) == ((2,), int, float)
    guesses = torch.tensor([[1.2], [1.5], [0.0]], device=device)
    counted = REGRESSION.step_figures(guesses, y, loss).counts
    assert (counted, [type(count) for count in counted]) == ((2, 3), [int, int])


class FakeGpu:
    """All tensors but labels and what was fetched lie on it; a wait makes the copies to the host.

    Until then their places hold rubbish, so that what reads one too early computes something else.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []  # for each wait, what it brings
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fetched: list[torch.Tensor] = []  # kept, so that no other gets the address of one
        patch.setattr(transfer, "_is_on_gpu", self._holds)
        patch.setattr(transfer, "_begun", self._begin)
        patch.setattr(torch.cuda, "current_stream", lambda device: self)

    def _holds(self, value: object) -> bool:
        if not isinstance(value, torch.Tensor) or (value.dim() and value.dtype is torch.int64):
            return False
        return value.data_ptr() not in {tensor.data_ptr() for tensor in self._fetched}

    def _begin(self, tensor: torch.Tensor) -> torch.Tensor:
        place = torch.full(tensor.shape, 77, dtype=tensor.dtype)
        self._pending.append((place, tensor))
        self._fetched.append(place)
        return place

    def record_event(self) -> "FakeGpu":
        return self

    def synchronize(self) -> None:
        if not self._pending:
            return
        names = {torch.bool: "finite", torch.float64: "figures"}
        shapes = [names.get(t.dtype, "x".join(map(str, t.shape))) for _, t in self._pending]
        self.log.append(" ".join([*shapes, "wait"]))
        for place, tensor in self._pending:
            place.copy_(tensor)
        self._pending.clear()


# Of each step, in order: what is fetched, and how often the GPU is waited for.
WAITS = {
    "2": ["200x128 wait", "figures 200x128 finite wait", "finite wait"],
    "2,4": [
        "200x128 wait",
        "200x64 wait",
        "figures 200x64 finite wait",
        "200x128 finite wait",
        "finite wait",
    ],
}


@pytest.mark.parametrize("cuts", WAITS)
def test_what_a_part_of_a_step_gives_is_waited_for_once(
    cuts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"model": "mlp", "cut": cuts, "rounds": 1, "clients": 1, "batch_size": 200}
    own |= {"keep_tensors": "all"}
    expected, received = simulated(tmp_path / "cpu", **own), []

    def allocate(spec: TensorSpec) -> torch.Tensor:
        received.append(torch.empty(spec.shape, dtype=spec.dtype))
        return received[-1]

    with monkeypatch.context() as patch:
        gpu = FakeGpu(patch)
        patch.setattr(cut, "host_memory", lambda device: allocate)
        for owner, name in ((cut.Cut, "_check"), (Party, "check_loss")):
            patch.setattr(owner, name, lambda *_: None)  # of what was received: on the host
        run = simulated(tmp_path / "gpu", **own)
    assert compare(expected, run).lines == []
    assert received
    waits = WAITS[cuts]
    assert gpu.log[1 : 1 + 4 * len(waits)] == 4 * waits  # behind what a round starts with


def test_numbers_keep_every_bit_of_a_loss() -> None:
    values = [torch.tensor(0.1), torch.tensor(2**40 + 1), 3]
    assert Numbers(values).wait() == [torch.tensor(0.1).item(), 2**40 + 1, 3]


def test_what_is_checked_may_lie_on_several_devices() -> None:
    fine, huge = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert are_finite([fine, torch.ones(2, device="cpu:0")])
    assert not are_finite([fine, huge])
    assert not are_finite([huge, fine])
    assert are_finite([])
