"""``FUSIONS``: how the activations of several clients become the input of the server's model.

In a vertical topology (Ceballos et al., 2020, arXiv 2008.04137) each client has other columns of
the same samples, and a first segment for them. The server packs what it receives into one tensor
(``pack``), and the first block of its segment, ``Fusion``, takes it apart and joins it::

    z of each client, (B, *shape_k) -> packed (B, sum of sizes) -> joined -> (B, *shape)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.errors import ConfigError
from sfl.files.torch_file import TensorSpec

Shape = tuple[int, ...]


def _concat(parts: Sequence[Tensor]) -> Tensor:
    """Join along dimension 1; parts that differ in others are flattened first."""
    alike = len({p.shape[2:] for p in parts}) == 1
    return torch.cat(list(parts) if alike else [p.flatten(1) for p in parts], dim=1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))


# Parts, each (B, *shape), in the order of their clients -> one tensor (B, *shape)
FUSIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "concat": _concat,
    "sum": lambda parts: _stacked(parts).sum(0),
    "mean": lambda parts: _stacked(parts).mean(0),
    "max": lambda parts: _stacked(parts).amax(0),  # shares the gradient of equal parts
}
SAME_SHAPES = FUSIONS.keys() - {"concat"}


class Fusion(nn.Module):
    """The block that joins several clients' activations.

    Where the joined shape is not the one that the next block expects, a linear projection follows,
    whose initial weights depend only on the seed: of dimension 1, or of all elements where other
    dimensions differ too.
    """

    def __init__(self, name: str, shapes: Sequence[Shape], wanted: Shape, seed: int) -> None:
        """``shapes``: of one sample of each client; ``wanted``: that the next block expects.

        Raises:
            ConfigError: the fusion needs equal shapes.
        """
        super().__init__()
        if name in SAME_SHAPES and len(set(shapes)) > 1:
            shown = ", ".join(str(list(shape)) for shape in shapes)
            raise ConfigError(
                f"--fusion {name} needs the same shape of each client's activations; they are"
                f" {shown}: give --fusion concat"
            )
        self._join, self.shapes, self._wanted = FUSIONS[name], tuple(shapes), wanted
        joined = self._joined(torch.zeros(1, sum(map(math.prod, shapes)))).shape[1:]
        self._is_of_all = joined[1:] != wanted[1:]
        sizes = map(math.prod, (joined, wanted)) if self._is_of_all else (joined[0], wanted[0])
        self.projection: nn.Module = nn.Identity()
        if joined != wanted:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seeds.derive(seed, seeds.FUSION))
                self.projection = nn.Linear(*sizes)

    def _joined(self, packed: Tensor) -> Tensor:
        return self._join(unpack(packed, self.shapes))

    def forward(self, packed: Tensor) -> Tensor:
        joined = self._joined(packed)
        if isinstance(self.projection, nn.Identity):
            return joined
        if self._is_of_all:
            of_all: Tensor = self.projection(joined.flatten(1))
            return of_all.reshape(-1, *self._wanted)
        projected: Tensor = self.projection(joined.movedim(1, -1))
        return projected.movedim(-1, 1)


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Return a batch of several clients as one tensor, a row for each sample."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unpack(packed: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Return the parts of each client, the inverse of ``pack``; also of packed gradients."""
    parts = packed.split_with_sizes([math.prod(shape) for shape in shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


class Joint:
    """What joins in a model: the spec of one sample's activations of each client, by client."""

    def __init__(self, samples: Mapping[int, TensorSpec]) -> None:
        """Raise ``ConfigError`` for activations of different dtypes."""
        self.samples = dict(sorted(samples.items()))
        if len({sample.dtype for sample in samples.values()}) > 1:
            raise ConfigError("the clients' activations differ in dtype: they cannot be joined")

    @property
    def shapes(self) -> list[Shape]:
        return [sample.shape for sample in self.samples.values()]

    def pack(self, given: Mapping[int, Tensor], size: int) -> Tensor:
        """Return the packed activations of ``size`` samples, with zeros for missing clients."""
        nothing = ((k, torch.zeros(size, *s.shape, dtype=s.dtype)) for k, s in self.samples.items())
        return pack([given.get(k, zeros) for k, zeros in nothing])

    def unpack(self, grads: Tensor) -> dict[int, Tensor]:
        """Return each client's part of the packed gradients."""
        return dict(zip(self.samples, unpack(grads, self.shapes), strict=True))
