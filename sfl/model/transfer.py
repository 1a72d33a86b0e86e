"""Tensors on their way between the host's memory and a device's.

A GPU copies to and from page-locked memory at full speed, and while the host goes on. torch keeps
such memory when it is freed and gives it out again once the copies that use it are done, so that
each step has the same buffers. On a CPU nothing is copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A GPU copies it in order with what it computes; do not wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, detached, after a wait for what its device computes."""
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor.detach(), non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy


def numbers(values: Sequence[int | float | Tensor]) -> list[float]:
    """Return numbers, some of them tensors of one element, after one wait for their GPU.

    All are exact: float64 has each float32, and each count below 2**53.
    """
    on_gpu = [v for v in values if isinstance(v, Tensor) and v.device.type == "cuda"]
    if on_gpu:
        fetched = torch.stack([value.detach().double() for value in on_gpu]).tolist()
        known = dict(zip(map(id, on_gpu), fetched, strict=True))
        values = [known.get(id(value), value) for value in values]
    return [value.item() if isinstance(value, Tensor) else value for value in values]
