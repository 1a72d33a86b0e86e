"""A plain loop over the joined graph of vertically partitioned data, in one process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.client_data import ClientData, batch_indices
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from tests.support.plain_training import data_of

JOIN: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "concat": lambda parts: torch.cat(list(parts), 1),
    "sum": lambda parts: torch.stack(list(parts)).sum(0),
    "mean": lambda parts: torch.stack(list(parts)).mean(0),
    "max": lambda parts: torch.stack(list(parts)).max(0).values,
}


NUM_CLASSES = {"parity": 2, "age": 2}
LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y, "class": lambda y: y, "parity": lambda y: y % 2, "age": lambda y: 1 - y % 2,
}  # fmt: skip


class PlainVertical:
    """One network with a front for each client's columns, as a reader of the paper writes it.

    With several tasks it has a head for each. ``missing``: clients whose activations are zeros.
    """

    def __init__(self, run: RunConfig, data: list[ClientData] | None = None) -> None:
        self.run, self.label = run, run.label_client
        self.data = data or data_of(run)
        names = run.party_models.split(",") if run.party_models else [run.model] * len(self.data)
        self.tasks = run.tasks.split(",")
        self.loss_weights = [float(w) for w in (run.task_weights or "1,1").split(",")]
        drawn = [seeds.derive(run.seed, "task", i) for i in range(1, len(self.tasks))]
        self.seeds = [run.seed, *drawn]
        self.fronts: list[nn.Sequential] = []
        for k, (part, name) in enumerate(zip(self.data, names, strict=True)):
            spec = model_spec(name)
            cut = int(run.cut if name == run.model and run.cut else spec.cut or run.cut or 0)
            own = run.seed if k == self.label else seeds.derive(run.seed, "initial weights", k)
            model = build(spec, part.input_shape, len(part.classes), seed=own)
            self.fronts.append(model[:cut])
            if k == self.label:
                self.backs, self.cut = [model[cut:]], cut
                for task, seed in zip(self.tasks[1:], drawn, strict=True):
                    head = build(spec, part.input_shape, NUM_CLASSES[task], seed=seed)
                    self.backs.append(head[cut:])
        with torch.no_grad():
            xs = [torch.zeros(2, *part.input_shape) for part in self.data]
            shapes = [front.eval()(x).shape[1:] for front, x in zip(self.fronts, xs, strict=True)]
        self.like, self.flattens = shapes[self.label], len({shape[1:] for shape in shapes}) > 1
        self.projections: list[nn.Module] = [nn.Identity() for _ in self.tasks]
        if run.fusion == "concat":
            widths = [s.numel() if self.flattens else s[0] for s in shapes]
            for index, seed in enumerate(self.seeds):
                torch.manual_seed(seeds.derive(seed, "fusion"))
                self.projections[index] = nn.Linear(sum(widths), widths[self.label])

    def parts(self) -> list[nn.Module]:
        ends = zip(self.projections, self.backs, strict=True)
        return [*self.fronts, *(nn.ModuleList(end) for end in ends)]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        make = OPTIMIZERS[self.run.optimizer]
        return [make(part.parameters(), self.run) for part in self.parts()]

    def train(self, missing: Callable[[int, int], Sequence[int]] = lambda r, i: ()) -> None:
        optimizers = self.optimizers()
        for round_index in range(self.run.rounds):
            if self.run.optimizer_state == "reset":
                optimizers = self.optimizers()
            count = len(self.data[0].train)
            drawn = batch_indices(count, self.run, round_index=round_index, client=self.label)
            for step, indices in enumerate(drawn):
                for part in self.parts():
                    part.train()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                out = missing(round_index, step)
                loss = self.loss(round_index, step, indices, out)
                loss.backward()
                for k, optimizer in enumerate(optimizers):
                    if k not in out:
                        optimizer.step()

    def loss(self, round_index: int, step: int, indices: Tensor, out: Sequence[int]) -> Tensor:
        zs: list[Tensor | None] = []
        for k, (front, part) in enumerate(zip(self.fronts, self.data, strict=True)):
            x, y = part.batch(part.train, indices)
            if k == self.label:
                wanted = y
            place = round_index, k, step
            zs.append(self.through(front, x, self.run.seed, place, 0) if k not in out else None)
        place = round_index, self.label, step
        losses = [
            weight * nn.functional.cross_entropy(self.end(i, zs, place), LABELS[task](wanted))
            for i, (task, weight) in enumerate(zip(self.tasks, self.loss_weights, strict=False))
        ]
        return sum(losses[1:], losses[0])

    def end(self, index: int, zs: Sequence[Tensor | None], place: tuple[int, int, int]) -> Tensor:
        """Return the outputs of a task's head."""
        like = next(z for z in zs if z is not None)
        # What the wire carries is a copy.
        received = [torch.zeros_like(like) if z is None else z.clone() for z in zs]
        if self.flattens:
            received = [z.flatten(1) for z in received]
        joined = JOIN[self.run.fusion](received)
        if self.flattens or joined.dim() == 2:
            z = self.projections[index](joined).reshape(-1, *self.like)
        else:
            z = self.projections[index](joined.movedim(1, -1)).movedim(-1, 1)
        return self.through(self.backs[index], z, self.seeds[index], place, self.cut + 1)

    def through(
        self, blocks: nn.Sequential, x: Tensor, seed: int, place: tuple[int, int, int], first: int
    ) -> Tensor:
        for block, module in enumerate(blocks, first):
            torch.manual_seed(seeds.derive(seed, seeds.BLOCK, *place, block))
            x = module(x)
        return x

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, named as those of a run's files."""
        found = {
            f"client_{k}/{n}": t
            for k, f in enumerate(self.fronts)
            for n, t in f.state_dict().items()
        }
        servers = ["server", *(f"task_{task}" for task in self.tasks[1:])]
        for server, projection, back in zip(servers, self.projections, self.backs, strict=True):
            projected = projection.state_dict().items()
            found |= {f"{server}/fusion.projection.{n}": t for n, t in projected}
            found |= {f"{server}/{n}": t for n, t in back.state_dict().items()}
        return found
