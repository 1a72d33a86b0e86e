"""The work that every contender of ``experiments.bench`` does: the same halves, the same batches.

Plain PyTorch: Adam on both halves, cross-entropy on the logits. Every client starts from the same
weights and has a back of its own, as in SFLV1; between rounds nothing is averaged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfl.config import RunConfig
from sfl.data.client_data import Source, batch_indices, load, part_of
from sfl.data.datasets import dataset_of
from sfl.model.zoo import build, split
from sfl.nodes import NodeConfig
from sfl.options import parse_options
from sfl.strategy.recipe import Recipe
from sfl.values import Position


@dataclass(frozen=True)
class Half:
    """One half of the model with its optimiser."""

    blocks: nn.Sequential
    optimizer: torch.optim.Optimizer


class Task:
    """What there is to train, of one set of options. x: (B, C, H, W), z: (B, *cut), y: (B,)."""

    def __init__(self, prog: str, options: Sequence[str]) -> None:
        """``options`` are a run's and a machine's, as of a simulation."""
        about = __doc__.partition("\n")[0]
        self.run, self._node = parse_options(options, RunConfig, NodeConfig, prog=prog, about=about)
        self._spec = dataset_of(self.run)
        torch.set_num_threads(self._node.threads)
        named = self._node.device
        self.device = torch.device("cpu" if named == "auto" else named)  # the peers' is the CPU

    def _half(self, index: int) -> Half:
        run, spec = self.run, self._spec
        recipe = Recipe.of(run)
        blocks = build(recipe.model, spec.input_shape, len(spec.classes), seed=run.seed)
        half = split(blocks, *recipe.cuts)[index].to(self.device)
        return Half(half, torch.optim.Adam(half.parameters(), lr=run.lr, fused=True))

    def front(self) -> Half:
        return self._half(0)

    def back(self) -> Half:
        return self._half(1)

    def batches(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a client's batches (x, y), round after round without end."""
        source = Source(self._node.data_path, self._node.cache_path, self._spec.input_shape)
        data = part_of(self._spec, self.run, client, load(self._spec, source))
        for r in range(self.run.rounds):
            drawn = batch_indices(len(data.train), self.run, round_index=r, client=client)
            for step, indices in enumerate(drawn):
                yield data.training_batch(indices, Position(self.run.run, r, step, client))
