"""Runs of models with several cuts: equal to the unsplit model, over sockets, from their files."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from sfl import seeds
from sfl.config import RunConfig
from sfl.data.client_data import ClientData, batch_indices
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.zoo import build, model_spec
from sfl.strategy.order import draw
from tests.support.pairwise import pairwise
from tests.support.plain_training import data_of, ordinary_training
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import simulated
from tests.support.weights import assert_equal, joined, weights

# Segments with BatchNorm and dropout at both parties.
CUTS = {"u-shaped": "3,9", "alternating of three": "3,6,9", "alternating of four": "2,5,7,10"}
MODEL = {"model": BN_DROPOUT, "batch_size": 200}
SCHEMES = ("sl", "sflv1", "sflv2", "sflv3")


@pytest.mark.parametrize(
    ("cut", "scheme", "state"), pairwise(CUTS.values(), SCHEMES, ["reset", "keep"])
)
def test_one_client_equals_the_unsplit_model(
    tmp_path: Path, cut: str, scheme: str, state: str
) -> None:
    options = MODEL | {"clients": 1, "optimizer_state": state}
    run = simulated(tmp_path, **options, cut=cut, scheme=scheme)
    ours = {n: t for n, t in joined(run).items() if not n.startswith("client_0")}
    assert_equal(ours, ordinary_training(RunConfig(**options)))


@pytest.mark.parametrize("scheme", ["sl", "sflv1"])
def test_where_the_cuts_are_makes_no_difference(tmp_path: Path, scheme: str) -> None:
    """To who trains with whom: the whole model is relayed, or averaged."""
    options = MODEL | {"scheme": scheme, "clients": 2, "clip_norm": 0.0}
    runs = [simulated(tmp_path / str(cut), **options, cut=cut) for cut in (6, *CUTS.values())]
    for run in runs[1:]:
        assert_equal(joined(run), joined(runs[0]))


@pytest.mark.parametrize("scheme", ["sflv2", "sflv3"])
def test_the_clients_segments_are_their_own_and_the_servers_are_shared(
    tmp_path: Path, scheme: str
) -> None:
    options = MODEL | {"cut": "3,9", "clients": 2, "scheme": scheme, "rounds": 1}
    run = RunConfig(**options)
    theirs = plain_u_shape(run, data_of(run), shares_back=scheme == "sflv2")
    assert_equal(weights(simulated(tmp_path, **options)), theirs)


def plain_u_shape(
    run: RunConfig, data: Sequence[ClientData], *, shares_back: bool
) -> dict[str, torch.Tensor]:
    """Train a round of models that autograd sees whole; return each segment's tensors."""
    clients = range(run.clients)
    models = [build(model_spec(run.model), (1, 28, 28), 10, seed=run.seed) for _ in clients]
    parts = {"front": slice(0, 3), "back": slice(3, 9), "client_head": slice(9, None)}
    if shares_back:
        for model in models[1:]:
            for index in range(3, 9):
                model[index] = models[0][index]
    optimizers = {
        (k, name): OPTIMIZERS[run.optimizer](models[k][part].parameters(), run)
        for k in clients
        for name, part in parts.items()
        if any(True for _ in models[k][part].parameters())
    }
    order = draw(run, clients, 0)
    batches = {
        k: list(batch_indices(len(data[k].train), run, round_index=0, client=k)) for k in order
    }
    for step in range(max(map(len, batches.values()))):
        for k in (k for k in order if step < len(batches[k])):
            x, y = data[k].batch(data[k].train, batches[k][step])
            for block, module in enumerate(models[k].train()):
                torch.manual_seed(seeds.derive(run.seed, seeds.BLOCK, 0, k, step, block))
                x = module(x)
            own = [optimizers.get((0 if shares_back and n == "back" else k, n)) for n in parts]
            for optimizer in own:
                if optimizer:
                    optimizer.zero_grad()
            nn.functional.cross_entropy(x, y).backward()
            for optimizer in own:
                if optimizer:
                    optimizer.step()
    return files_of(run, models, data)


def files_of(
    run: RunConfig, models: Sequence[nn.Sequential], data: Sequence[ClientData]
) -> dict[str, torch.Tensor]:
    raise NotImplementedError
