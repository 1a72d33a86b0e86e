"""What a run takes of a machine's memory: estimated before anything of it is allocated.

A server names model, image size and batch size, a client the shape of its samples. How much of the
other one's memory that may take, ``--memory-limit`` says on each machine.
"""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfl.errors import ConfigError
from sfl.model.zoo import make_model
from sfl.nodes import PeerNode, parse_bytes
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import MAX_EVALUATION_BATCH, MAX_EVALUATION_BYTES

UNKNOWN_BYTES = 8 * 10**9  # of a machine that does not say how much memory it has
# How many times a client has its weights: the whole model once; the front as it trains it, its
# gradients, two values of Adam for each, and three copies while a file of them is made or read.
TRAINED_COPIES = 7
# How many times it has a batch's images: the batch, the next one, and what it is made from.
IMAGE_COPIES = 4
_CONTAINERS = (  # limits of a container, in Linux's two versions of control groups
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_bytes() -> int:
    """Return how much memory this machine, or this container, has."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(path.read_text()))
    return min(found, default=UNKNOWN_BYTES)


def limit_of(node: PeerNode) -> int:
    """Return how much memory another machine's choices may take here."""
    return parse_bytes(node.memory_limit) if node.memory_limit else machine_bytes() // 2


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts; those of a sample count every layer's output, float32."""

    whole: int  # weights of all segments
    front: int  # weights of the client's segment
    sample: int  # an input
    front_values: int  # of a sample, in the client's segment
    at_cut: int  # of a sample; 0: there is no cut
    all_values: int  # of a sample, in all segments


def sizes_of(recipe: Recipe, input_shape: tuple[int, ...], num_classes: int) -> Sizes:
    """Return the sizes of a run's model, of which no weight is allocated.

    What a user's own model does not tell without memory counts as nothing: who allows its import
    knows it.
    """
    sample = 4 * math.prod(input_shape)
    try:
        with torch.device("meta"):
            model = make_model(recipe.model, input_shape, num_classes, seed=recipe.run.seed)
    except ConfigError:  # said when it is built; or it is a user's own, and needs its memory
        model = None
    if not isinstance(model, nn.Sequential):
        return Sizes(0, 0, sample, 0, 0, 0)
    is_cut = recipe.scheme.exchange is Exchange.CUT
    front = nn.Sequential(*list(model)[: recipe.cut]) if is_cut else model
    whole, of_front = _weight_bytes(model), _weight_bytes(front)
    values = _values(model, input_shape)
    num_ours = len(list(_leaves(front)))
    at_cut = values[num_ours - 1] if is_cut and 0 < num_ours <= len(values) else 0
    return Sizes(whole, of_front, sample, sum(values[:num_ours]), at_cut, sum(values))


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))


def _leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


def _values(model: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Return the bytes of each layer's output for one sample, in the order of the layers.

    A batch of no samples takes no memory; a layer that does not take one is asked without memory,
    which is slower to begin with.
    """
    model.eval()
    for device, count in (("cpu", 0), ("meta", 1)):
        values: list[int] = []

        def note(module: nn.Module, given: object, z: object, values: list[int] = values) -> None:
            if isinstance(z, Tensor):
                values.append(math.prod(z.shape[1:]) * z.itemsize)

        state = {n: _unwritten(t, device) for n, t in model.state_dict().items()}
        hooks = [leaf.register_forward_hook(note) for leaf in _leaves(model)]
        try:
            model.load_state_dict(state, assign=True)
            with torch.no_grad():
                model(torch.empty(count, *input_shape, device=device))
            return values
        except Exception:  # noqa: BLE001 - a user's own code; when it is built it is told
            continue
        finally:
            for hook in hooks:
                hook.remove()
    return []


def _unwritten(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor like this one, of which no page is in memory until somebody writes to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def client_bytes(
    batch_size: int, sizes: Sizes, *, most_samples: int, hosted: int
) -> dict[str, int]:
    """Return what a run takes at a machine with so many clients, by what it is for."""
    weights = hosted * (sizes.whole + TRAINED_COPIES * sizes.front)
    batch = min(batch_size + 1, most_samples)
    evaluated = min(_evaluation_batch(sizes), most_samples)
    images = IMAGE_COPIES * sizes.sample
    training = batch * (images + 2 * sizes.front_values)
    evaluating = evaluated * (images + sizes.front_values)
    return {"weights": weights, "batches": max(training, evaluating)}


def _evaluation_batch(sizes: Sizes) -> int:
    fit = MAX_EVALUATION_BYTES // max(sizes.at_cut, 1)
    return max(1, min(MAX_EVALUATION_BATCH, fit))


def server_bytes(recipe: Recipe, sizes: Sizes, num_clients: int) -> dict[str, int]:
    """Return what a run takes at its server, by what it is for."""
    copies = num_clients if recipe.scheme.copies_back else 1
    trained = sizes.whole - sizes.front if sizes.at_cut else sizes.whole
    values = sizes.all_values - sizes.front_values + sizes.at_cut
    fronts = sizes.front * (num_clients + 2)
    weights = sizes.whole + fronts + trained * (copies + TRAINED_COPIES)
    return {"weights": weights, "batches": 2 * (recipe.run.batch_size + 1) * values}


def too_much(needed: dict[str, int], node: PeerNode, why: str) -> str:
    """Say in one line that something takes more memory than another machine may take; else "".

    ``why`` is whose choice it is.
    """
    total, limit = sum(needed.values()), limit_of(node)
    if total <= limit:
        return ""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in needed.items() if size)
    return (
        f"{why} would take about {megabytes(total)} of memory here ({parts}); --memory-limit"
        f" allows {megabytes(limit)}"
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
