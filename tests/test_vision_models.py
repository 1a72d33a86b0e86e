"""Every model of the field, cut anywhere: the same function, and the same training step."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from experiments.support.costs import segments_of
from sfl import seeds
from sfl.config import RunConfig
from sfl.errors import ConfigError
from sfl.model.segment import Segment, train_step
from sfl.model.training import Training
from sfl.model.zoo import MODELS, build, model_spec, split
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position

CPU = torch.device("cpu")
SHAPES = {
    "mlp": (1, 28, 28), "lenet5": (1, 28, 28), "cnn-mnist": (1, 28, 28),
    "cnn-cifar10": (3, 32, 32), "cnn-femnist": (1, 28, 28), "alexnet": (3, 64, 64),
    "vgg16": (3, 32, 32), "resnet18": (3, 64, 64), "resnet50": (3, 32, 32),
}  # fmt: skip
BLOCKS = {
    "mlp": 6, "lenet5": 12, "cnn-mnist": 14, "cnn-cifar10": 12, "cnn-femnist": 8, "alexnet": 22,
    "vgg16": 40, "resnet18": 15, "resnet50": 23,
}  # fmt: skip
LARGE = ("alexnet", "vgg16")  # 57 and 134 million weights: a second to build one
TORCHVISION = ("alexnet", "vgg16", "resnet18", "resnet50")


def batch(name: str, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(size, *SHAPES[name], generator=drawn), torch.arange(size) % 10


def test_every_model_is_here() -> None:
    assert SHAPES.keys() == BLOCKS.keys() == MODELS.keys()


def marked(names: Iterable[str]) -> list[object]:
    """Return names of models as parameters, those of the large ones slow."""
    slow = {True: [pytest.mark.slow], False: []}
    return [pytest.param(name, marks=slow[name in LARGE]) for name in names]


@pytest.mark.parametrize("name", marked(TORCHVISION))
def test_the_blocks_are_torchvisions_network(name: str) -> None:
    from torchvision import models

    ours = build(model_spec(name), (3, 64, 64), 10, seed=4).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(4, seeds.INITIAL_WEIGHTS))
        theirs = getattr(models, name)(weights=None, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", marked(MODELS))
def test_both_segments_together_are_the_whole_model_at_every_cut(name: str) -> None:
    model = build(model_spec(name), SHAPES[name], 10, seed=1).eval()
    x, _ = batch(name)
    assert len(model) == BLOCKS[name]
    with torch.no_grad():
        whole = model(x)
        for cut in range(len(model) + 1):
            front, back = split(model, cut)
            assert torch.equal(back(front(x)), whole), cut


def cuts_to_train(name: str) -> list[int]:
    """Return every cut; of the networks of 57 and 134 million weights, some of each kind."""
    some = {"alexnet": [1, 3, 7, 14, 16, 18, 21], "vgg16": [1, 2, 5, 17, 31, 33, 36, 39]}
    return some.get(name, list(range(1, BLOCKS[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_a_training_step_at_any_cut_gives_the_weights_of_the_unsplit_model(name: str) -> None:
    """Bit for bit, BatchNorm's statistics and dropout included."""
    run = RunConfig(model=name, optimizer="sgd", lr=0.05, seed=2)
    at, (x, y) = Position("r", 1, 3, 0), batch(name)
    model = build(model_spec(name), SHAPES[name], 10, seed=2)
    whole = Segment(model, 0, Training.of(run, ()), CPU)
    loss = nn.functional.cross_entropy(whole.forward(x, at), y)
    loss.backward()
    whole.update()
    expected = whole.state()
    for cut in cuts_to_train(name):
        cut_model = SplitModel(Recipe.of(RunConfig(**vars(run) | {"cut": cut})), SHAPES[name], 10)
        front, back = segments_of(cut_model, CPU).values()
        figures, dz = train_step(back, front.forward(x, at), y, at)
        front.backward(dz)
        for segment in (front, back):
            segment.update()
        assert figures.loss == loss.item(), cut
        ours = front.state() | back.state()
        assert ours.keys() == expected.keys()
        assert [n for n in ours if not torch.equal(ours[n], expected[n])] == [], cut


def test_resnet18_is_cut_where_splitfed_cuts_it() -> None:
    split_model = SplitModel(Recipe.of(RunConfig(model="resnet18")), (3, 64, 64), 7)
    assert split_model.cuts == (5,)
    assert split_model.features_spec(8).shape == (8, 64, 16, 16)
    assert not any(name.startswith("layer1_1") for name in split_model.front_spec)
    assert any(name.startswith("layer1_0") for name in split_model.front_spec)


@pytest.mark.parametrize("name", marked(["resnet18", "vgg16", "alexnet"]))
def test_channels_and_classes_follow_the_data(name: str) -> None:
    shape = (1, 64, 64)
    model = build(model_spec(name), shape, 62, seed=0).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, *shape)).shape == (1, 62)


@pytest.mark.parametrize("name", marked(["alexnet", "vgg16"]))
def test_images_too_small_for_a_model_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="does not take samples of shape"):
        SplitModel(Recipe.of(RunConfig(model=name)), (1, 28, 28), 10)


def test_femnists_and_mnists_cnns_have_the_fields_widths() -> None:
    femnist = build(model_spec("cnn-femnist"), (1, 28, 28), 62, seed=0)
    assert femnist.fc.weight.shape == (62, 3136)
    mnist = build(model_spec("cnn-mnist"), (1, 28, 28), 10, seed=0)
    assert [mnist.fc1.in_features, mnist.fc2.in_features, mnist.fc3.in_features] == [784, 256, 128]
    cifar = build(model_spec("cnn-cifar10"), (3, 32, 32), 10, seed=0)
    assert [cifar.fc1.in_features, cifar.fc2.in_features, cifar.fc3.in_features] == [400, 120, 84]
