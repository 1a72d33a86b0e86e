"""Tensors on their way between the host's memory and a device's.

A GPU copies to and from page-locked memory at full speed, and while the host goes on. torch keeps
such memory when it is freed and gives it out again once the copies that use it are done, so that
each step has the same buffers. On a CPU nothing is copied.

What is fetched is waited for with an event, which ``torch.cuda.set_sync_debug_mode`` lets pass: it
finds the waits that nobody meant, as of ``item()``.
"""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sfl.files.torch_file import Allocate, TensorSpec, finite_flags


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A GPU copies it in order with what it computes; do not wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # itself, if it is page-locked


def host_memory(device: torch.device) -> Allocate | None:
    """Return what allocates memory that a device copies from at full speed; None: any is fine."""
    return _page_locked if device.type == "cuda" else None


def _page_locked(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, pin_memory=True)


class Fetch:
    """Tensors on their way to the host: their copies begin at once, and are waited for once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.given = [tensor.detach() for tensor in tensors]  # on their devices
        self._copies = [_begun(t) if _is_on_gpu(t) else t.cpu() for t in self.given]
        gpus = dict.fromkeys(t.device for t in self.given if _is_on_gpu(t))
        self._events = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]

    def wait(self) -> list[Tensor]:
        """Return the tensors on the CPU, after a wait for what their devices compute."""
        for event in self._events:
            event.synchronize()
        return self._copies


def _begun(tensor: Tensor) -> Tensor:
    """Return where a tensor will be on the CPU; its GPU copies it when it has computed it."""
    return _page_locked(TensorSpec.of(tensor)).copy_(tensor, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, detached, after a wait for what its device computes."""
    return Fetch([tensor]).wait()[0]


class Numbers:
    """Numbers, some of them tensors of one element, which are fetched from their GPU together."""

    def __init__(self, values: Sequence[int | float | Tensor]) -> None:
        self._values = values
        there = [v.detach().double().reshape(()) for v in values if _is_on_gpu(v)]
        self._fetch = Fetch([torch.stack(there)] if there else [])

    def wait(self) -> list[float]:
        """Return the numbers, after a wait for what their GPU computes.

        All are exact: float64 has each float32, and each count below 2**53.
        """
        fetched = (number for row in self._fetch.wait() for number in row.tolist())
        return [next(fetched) if _is_on_gpu(v) else _plain(v) for v in self._values]


def _is_on_gpu(value: int | float | Tensor) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _plain(value: int | float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Do as ``sfl.files.torch_file.are_finite``, with one wait that is meant."""
    return all(map(bool, Fetch(finite_flags(tensors)).wait()))
