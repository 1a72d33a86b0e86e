"""The unsplit model, trained in a plain loop."""

import torch

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.client_data import ClientData, batch_indices, part_of
from sfl.data.datasets import dataset_spec
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from tests.support.made_data import loaded


def ordinary_training(run: RunConfig) -> dict[str, torch.Tensor]:
    """Train the unsplit model for two rounds in a plain loop, one optimiser a client; average."""
    spec = dataset_spec(run.dataset)
    both = loaded(run.dataset)
    data = [part_of(spec, run, k, both) for k in range(run.clients)]
    models = [build(model_spec(run.model), (1, 28, 28), 10, seed=run.seed) for _ in data]
    optimizers = [OPTIMIZERS[run.optimizer](model.parameters(), run) for model in models]
    average = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    for round_index in range(2):
        for k, model in enumerate(models):
            model.load_state_dict(average)
            if run.optimizer_state == "reset":
                optimizers[k] = OPTIMIZERS[run.optimizer](model.parameters(), run)
            train_round(model, optimizers[k], data[k], run, round_index, k)
        total = sum(len(part.train) for part in data)
        states = [model.state_dict() for model in models]
        for name, first in average.items():
            parts = zip(states, data, strict=True)
            summed = sum(state[name].double() * len(part.train) for state, part in parts)
            mean = summed / total
            average[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return average


def train_round(
    model: torch.nn.Sequential,
    optimizer: torch.optim.Optimizer,
    data: ClientData,
    run: RunConfig,
    round_index: int,
    client: int,
) -> None:
    model.train()
    batches = batch_indices(len(data.train), run, round_index=round_index, client=client)
    for step, indices in enumerate(batches):
        x, y = data.batch(data.train, indices)
        for block, module in enumerate(model):
            drawn = seeds.derive(run.seed, seeds.BLOCK, round_index, client, step, block)
            torch.manual_seed(drawn)
            x = module(x)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x, y).backward()
        optimizer.step()


def data_of(run: RunConfig) -> list[ClientData]:
    spec = dataset_spec(run.dataset)
    both = loaded(run.dataset)
    return [part_of(spec, run, k, both) for k in range(run.clients)]
