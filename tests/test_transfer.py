"""Tensors between host and device: bit for bit the same, and no copies on a CPU."""

import pytest
import torch

from sfl.files.torch_file import are_finite, identical
from sfl.model.task import TASKS
from sfl.model.transfer import numbers, to_device, to_host
from tests.support.regression import REGRESSION

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
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers([*values, 7]) == [*(v.item() for v in values), 7]
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


def test_numbers_keep_every_bit_of_a_loss() -> None:
    values = [torch.tensor(0.1), torch.tensor(2**40 + 1), 3]
    assert numbers(values) == [torch.tensor(0.1).item(), 2**40 + 1, 3]


def test_what_is_checked_may_lie_on_several_devices() -> None:
    fine, huge = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert are_finite([fine, torch.ones(2, device="cpu:0")])
    assert not are_finite([fine, huge])
    assert not are_finite([huge, fine])
    assert are_finite([])
