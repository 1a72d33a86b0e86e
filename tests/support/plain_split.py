"""A plain loop over the blocks of clients and server, without a network between them."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.client_data import batch_indices
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from tests.support.plain_training import data_of


class Plain:
    """A plain loop over an unsplit graph, as a reader of the papers writes it.

    The blocks of a client (``fronts``) and of the server (``backs``) take turns at each cut.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.data = data_of(run)
        cuts = list(map(int, str(run.cut).split(",")))
        whole = [build(model_spec(run.model), (1, 28, 28), 10, seed=run.seed) for _ in self.data]
        self.is_back = [sum(index >= cut for cut in cuts) % 2 for index in range(len(whole[0]))]
        self.fronts, self.backs = ([self.blocks(m, side) for m in whole] for side in (0, 1))
        self.front_optimizers = [self.optimizer(front) for front in self.fronts]
        self.back_optimizers = [self.optimizer(back) for back in self.backs]

    def blocks(self, model: nn.Sequential, side: int) -> nn.Sequential:
        named = zip(model.named_children(), self.is_back, strict=True)
        return nn.Sequential(OrderedDict(block for block, is_back in named if is_back == side))

    def optimizer(self, half: nn.Sequential) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.run.optimizer](half.parameters(), self.run)

    def start_round(self) -> None:
        if self.run.optimizer_state == "reset":
            self.front_optimizers = [self.optimizer(front) for front in self.fronts]
            self.back_optimizers = [self.optimizer(back) for back in self.backs]

    def batches(self, k: int, round_index: int) -> Iterator[tuple[int, torch.Tensor]]:
        count = len(self.data[k].train)
        drawn = batch_indices(count, self.run, round_index=round_index, client=k)
        return enumerate(drawn)

    def step(self, k: int, back: int, round_index: int, step: int, indices: torch.Tensor) -> None:
        x, y = self.data[k].batch(self.data[k].train, indices)
        self.fronts[k].train()
        self.backs[back].train()
        sides = iter(self.fronts[k]), iter(self.backs[back])
        for block, is_back in enumerate(self.is_back):
            torch.manual_seed(seeds.derive(self.run.seed, seeds.BLOCK, round_index, k, step, block))
            x = next(sides[is_back])(x)
        optimizers = self.front_optimizers[k], self.back_optimizers[back]
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(x, y).backward()
        for optimizer in optimizers:
            optimizer.step()

    def average(self, halves: list[nn.Sequential]) -> None:
        counts = [len(part.train) for part in self.data]
        states = [half.state_dict() for half in halves]
        average = {}
        for name, first in states[0].items():
            parts = zip(states, counts, strict=True)
            mean = sum(state[name].double() * n for state, n in parts) / sum(counts)
            average[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
        for half in halves:
            half.load_state_dict(average)

    def weights(self, front: int = 0) -> dict[str, torch.Tensor]:
        return self.fronts[front].state_dict() | self.backs[0].state_dict()
