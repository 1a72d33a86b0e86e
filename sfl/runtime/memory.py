"""Estimate the memory that a run takes on a machine, before any of it is allocated.

A server chooses model, image size and batch size, a client the shape of its samples;
``--memory-limit`` bounds on each machine what the other's choices may take.
"""

import contextlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfl.errors import ConfigError
from sfl.model.topology import Holder
from sfl.model.zoo import make_model
from sfl.nodes import PeerNode
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import MAX_EVALUATION_BATCH, MAX_EVALUATION_BYTES
from sfl.values import parse_bytes

UNKNOWN_BYTES = 8 * 10**9  # assumed if the system does not report its memory
# Copies of trained weights: the weights, their gradients, two values of Adam for each, and three
# copies while a file of them is written or read.
TRAINED_COPIES = 7
# Copies of a batch's images: the batch, the next one, and the samples that they are built from.
IMAGE_COPIES = 4
_CONTAINERS = (  # memory limits of a container: cgroup v2, v1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def machine_memory_bytes() -> int:
    """Return the memory of this machine, or of this container, in bytes."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(path.read_text()))
    return min(found, default=UNKNOWN_BYTES)


def memory_limit_bytes(node: PeerNode) -> int:
    """Return how many bytes of memory another machine's choices may take here."""
    return parse_bytes(node.memory_limit) if node.memory_limit else machine_memory_bytes() // 2


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights, and of one sample's activations in it."""

    whole: int  # weights of all segments
    front: int  # weights of the client's segments
    sample: int  # one input, float32
    front_values: int  # outputs of all layers of the client's segments
    at_cuts: tuple[int, ...]  # activations at each cut
    all_values: int  # outputs of all layers of the model


def sizes_of(
    recipe: Recipe, input_shape: tuple[int, ...], num_classes: int, client: int = 0
) -> Sizes:
    """Return the sizes of a client's model without allocating its weights.

    A user's own model that cannot be built so counts as 0 bytes: its import was allowed knowingly.
    """
    sample, (spec, cuts) = 4 * math.prod(input_shape), recipe.party(client)
    try:
        with torch.device("meta"):
            model = make_model(spec, input_shape, num_classes, seed=recipe.run.seed)
    except ConfigError:  # reported when the model is built; or a user's own needs real memory
        model = None
    if not isinstance(model, nn.Sequential):
        return Sizes(0, 0, sample, 0, (), 0)
    blocks, cuts = list(model), cuts if recipe.scheme.exchange is Exchange.CUT else ()
    bounds = itertools.pairwise((0, *cuts, len(blocks)))
    segments = [nn.Sequential(*blocks[start:end]) for start, end in bounds]
    left, values = iter(_values(model, input_shape)), []  # of the layers of each segment
    for segment in segments:
        values.append(list(itertools.islice(left, len(_leaves(segment)))))
    of_clients = [holder is Holder.CLIENT for holder in recipe.segments.values()]
    return Sizes(
        whole=_weight_bytes(model),
        front=sum(map(_weight_bytes, itertools.compress(segments, of_clients))),
        sample=sample,
        front_values=sum(map(sum, itertools.compress(values, of_clients))),
        at_cuts=tuple(of_one[-1] if of_one else 0 for of_one in values[:-1]),
        all_values=sum(map(sum, values)),
    )


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))


def _leaves(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not list(module.children())]


def _values(model: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Return the bytes of each layer's output for one sample, in the order of the layers.

    An empty batch takes no memory. If a layer refuses it, the meta device is used, whose first use
    is slower.
    """
    model.eval()
    for device, count in (("cpu", 0), ("meta", 1)):
        values: list[int] = []

        def note(module: nn.Module, given: object, z: object, values: list[int] = values) -> None:
            if isinstance(z, Tensor):
                values.append(math.prod(z.shape[1:]) * z.itemsize)

        hooks = [leaf.register_forward_hook(note) for leaf in _leaves(model)]
        try:
            state = {n: _empty_like(t, device) for n, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
            with torch.no_grad():
                model(torch.empty(count, *input_shape, device=device))
            return values
        except Exception:  # noqa: BLE001 - a user's own code, or far too large; reported later
            continue
        finally:
            for hook in hooks:
                hook.remove()
    return []


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    """Return an uninitialised tensor of the same shape; its pages take no memory until written."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def client_bytes(
    batch_size: int, sizes: Sizes, *, most_samples: int, hosted: int
) -> dict[str, int]:
    """Return the bytes that a run takes in a process of ``hosted`` clients, by purpose."""
    weights = hosted * (sizes.whole + TRAINED_COPIES * sizes.front)
    batch = min(batch_size + 1, most_samples)
    evaluated = min(_evaluation_batch(sizes), most_samples)
    images = IMAGE_COPIES * sizes.sample
    training = batch * (images + 2 * sizes.front_values)
    evaluating = evaluated * (images + sizes.front_values)
    return {"weights": weights, "batches": max(training, evaluating)}


def _evaluation_batch(sizes: Sizes) -> int:
    fit = MAX_EVALUATION_BYTES // max(*sizes.at_cuts, 1, 1)
    return max(1, min(MAX_EVALUATION_BATCH, fit))


def server_bytes(recipe: Recipe, sizes: Sizes, num_clients: int) -> dict[str, int]:
    """Return the bytes that a run takes at its server, by purpose."""
    copies = len(recipe.scheme.backs_of(range(num_clients)))
    trained = sizes.whole - sizes.front if sizes.at_cuts else sizes.whole
    values = sizes.all_values - sizes.front_values + sum(sizes.at_cuts)
    fronts = sizes.front * (num_clients + 2)
    weights = sizes.whole + fronts + trained * (copies + TRAINED_COPIES)
    return {"weights": weights, "batches": 2 * (recipe.run.batch_size + 1) * values}


def why_too_large(needed: dict[str, int], node: PeerNode, why: str) -> str:
    """Return one line that says that ``needed`` exceeds ``--memory-limit``; "" if it does not.

    ``why`` names the choice that needs the memory, and whose it is.
    """
    total, limit = sum(needed.values()), memory_limit_bytes(node)
    if total <= limit:
        return ""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in needed.items() if size)
    return (
        f"{why} would take about {megabytes(total)} of memory here ({parts}); --memory-limit"
        f" allows {megabytes(limit)}"
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
