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


class PlainVertical:
    """One network with a front for each client's columns, as a reader of the paper writes it.

    ``missing``: clients whose activations are zeros.
    """

    def __init__(self, run: RunConfig, data: list[ClientData] | None = None) -> None:
        self.run, self.label = run, run.label_client
        self.data = data or data_of(run)
        names = run.party_models.split(",") if run.party_models else [run.model] * len(self.data)
        self.fronts: list[nn.Sequential] = []
        for k, (part, name) in enumerate(zip(self.data, names, strict=True)):
            spec = model_spec(name)
            cut = int(run.cut if name == run.model and run.cut else spec.cut or run.cut or 0)
            own = run.seed if k == self.label else seeds.derive(run.seed, "initial weights", k)
            model = build(spec, part.input_shape, len(part.classes), seed=own)
            self.fronts.append(model[:cut])
            if k == self.label:
                self.back, self.cut = model[cut:], cut
        with torch.no_grad():
            xs = [torch.zeros(2, *part.input_shape) for part in self.data]
            shapes = [front.eval()(x).shape[1:] for front, x in zip(self.fronts, xs, strict=True)]
        self.like, self.flattens = shapes[self.label], len({shape[1:] for shape in shapes}) > 1
        self.projection: nn.Module = nn.Identity()
        if run.fusion == "concat":
            torch.manual_seed(seeds.derive(run.seed, "fusion"))
            widths = [s.numel() if self.flattens else s[0] for s in shapes]
            self.projection = nn.Linear(sum(widths), widths[self.label])

    def parts(self) -> list[nn.Module]:
        return [*self.fronts, nn.ModuleList([self.projection, self.back])]

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
            zs.append(self.through(front, x, (round_index, k, step), 0) if k not in out else None)
        like = next(z for z in zs if z is not None)
        # What the wire carries is a copy.
        received = [torch.zeros_like(like) if z is None else z.clone() for z in zs]
        if self.flattens:
            received = [z.flatten(1) for z in received]
        joined = JOIN[self.run.fusion](received)
        if self.flattens or joined.dim() == 2:
            z = self.projection(joined).reshape(-1, *self.like)
        else:
            z = self.projection(joined.movedim(1, -1)).movedim(-1, 1)
        outputs = self.through(self.back, z, (round_index, self.label, step), self.cut + 1)
        return nn.functional.cross_entropy(outputs, wanted)

    def through(
        self, blocks: nn.Sequential, x: Tensor, place: tuple[int, int, int], first: int
    ) -> Tensor:
        for block, module in enumerate(blocks, first):
            torch.manual_seed(seeds.derive(self.run.seed, seeds.BLOCK, *place, block))
            x = module(x)
        return x

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, named as those of a run's files."""
        found = {
            f"client_{k}/{n}": t
            for k, f in enumerate(self.fronts)
            for n, t in f.state_dict().items()
        }
        projected = self.projection.state_dict().items()
        found |= {f"server/fusion.projection.{n}": t for n, t in projected}
        return found | {f"server/{n}": t for n, t in self.back.state_dict().items()}
