"""A plain loop over one network with a head for each task, in one process."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.client_data import batch_indices
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from tests.support.plain_training import data_of

NUM_CLASSES = {"class": 10, "digit": 10, "parity": 2}


class PlainTasks:
    """A client's front, and a back for each task, as a reader of the paper writes it."""

    def __init__(self, run: RunConfig) -> None:
        self.run, self.tasks, self.cut = run, run.tasks.split(","), int(run.cut or 0)
        (self.data,) = data_of(run)
        self.weights = [float(w) for w in (run.task_weights or "1,1,1").split(",")]
        self.seeds = [run.seed, *(seeds.derive(run.seed, "task", i) for i in (1, 2))]
        models = [
            build(model_spec(run.model), (1, 28, 28), NUM_CLASSES[task], seed=seed)
            for task, seed in zip(self.tasks, self.seeds, strict=False)
        ]
        self.front, self.backs = models[0][: self.cut], [model[self.cut :] for model in models]

    def train(self) -> None:
        parts = [self.front, *self.backs]
        optimizers: list[torch.optim.Optimizer] = []
        for round_index in range(self.run.rounds):
            if self.run.optimizer_state == "reset" or not optimizers:
                make = OPTIMIZERS[self.run.optimizer]
                optimizers = [make(part.parameters(), self.run) for part in parts]
            count = len(self.data.train)
            drawn = batch_indices(count, self.run, round_index=round_index, client=0)
            for step, indices in enumerate(drawn):
                for part, optimizer in zip(parts, optimizers, strict=True):
                    part.train()
                    optimizer.zero_grad()
                self.loss(round_index, step, indices).backward()
                for optimizer in optimizers:
                    optimizer.step()

    def loss(self, round_index: int, step: int, indices: Tensor) -> Tensor:
        x, y = self.data.batch(self.data.train, indices)
        z = self.through(self.front, x, self.run.seed, (round_index, 0, step), 0)
        losses = []
        for task, back, weight, seed in zip(
            self.tasks, self.backs, self.weights, self.seeds, strict=False
        ):
            labels = y % 2 if task == "parity" else y
            # What the wire carries is a copy.
            outputs = self.through(back, z.clone(), seed, (round_index, 0, step), self.cut)
            losses.append(weight * nn.functional.cross_entropy(outputs, labels))
        return sum(losses, torch.zeros(()))

    def through(
        self, blocks: nn.Sequential, x: Tensor, seed: int, place: tuple[int, int, int], first: int
    ) -> Tensor:
        for block, module in enumerate(blocks, first):
            torch.manual_seed(seeds.derive(seed, seeds.BLOCK, *place, block))
            x = module(x)
        return x

    def states(self) -> list[dict[str, Tensor]]:
        """Return the weights of the front, and of each task's back."""
        return [dict(part.state_dict()) for part in (self.front, *self.backs)]


def states_of(run: Path, tasks: str, round_index: int = 1) -> list[dict[str, Tensor]]:
    """Return what a run has recorded of the same weights."""
    out, mark = run.parent.parent, f"{round_index:03d}.pt"
    folders = [run, run, *(out / f"task_{task}" / run.name for task in tasks.split(",")[1:])]
    names = ["client_model", *["server_model"] * (len(folders) - 1)]
    files = [f / "models" / f"{n}_{mark}" for f, n in zip(folders, names, strict=True)]
    return [torch.load(file, weights_only=True) for file in files]
