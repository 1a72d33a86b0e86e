"""Models as rows of top-level blocks, and cuts between them.

A model is an ``nn.Sequential``; a cut is the number of blocks in front of it. Blocks keep their
names when a model is split: the segments' state dicts join to that of the whole model.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sfl import seeds
from sfl.errors import ConfigError, told
from sfl.model.blocks import check_row, names_of
from sfl.model.vision import pretrained_state, vision_model
from sfl.registry import look_up

Shape = tuple[int, ...]  # of one sample, (channels, height, width) for images


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model, and its default cut."""

    build: Callable[[Shape, int], nn.Sequential]  # (input shape, number of classes)
    cut: int | None  # None: --cut is required
    # Weights that come with it, by their names in the row of blocks; None: there are none.
    pretrained: Callable[[], dict[str, Tensor]] | None = None


def mlp(input_shape: Shape, num_classes: int) -> nn.Sequential:
    """Build the perceptron of the field's first socket implementation: 784-128 | 128-64-10."""
    num_inputs = int(torch.Size(input_shape).numel())
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(num_inputs, 128),
            relu1=nn.ReLU(),
            fc2=nn.Linear(128, 64),
            relu2=nn.ReLU(),
            fc3=nn.Linear(64, num_classes),
        )
    )


def lenet5(input_shape: Shape, num_classes: int) -> nn.Sequential:
    """Build LeNet-5 (LeCun et al. 1998, Fig. 2) with ReLU and max-pooling, as SplitFed uses it.

    The default cut is behind the convolutions: 400 floats per sample for 28x28 images.
    """
    return _like_lenet5(input_shape, num_classes, padding=(2, 0), hidden=(120, 84))


def cnn_cifar10(input_shape: Shape, num_classes: int) -> nn.Sequential:
    """Build the small CNN of the field's frameworks for CIFAR-10: 3-6-16 k5, FC 400-120-84-10."""
    return _like_lenet5(input_shape, num_classes, padding=(0, 0), hidden=(120, 84))


def cnn_mnist(input_shape: Shape, num_classes: int) -> nn.Sequential:
    """Build the CNN of the field's frameworks for MNIST: 1-6, 6-16 k5 p2, FC 784-256-128-10."""
    return _like_lenet5(input_shape, num_classes, padding=(2, 2), hidden=(256, 128), dropout=0.5)


def _like_lenet5(
    input_shape: Shape,
    num_classes: int,
    *,
    padding: tuple[int, int],
    hidden: tuple[int, int],
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build two 5x5 convolutions of 6 and 16 channels with pools, and three linear layers."""
    channels, height, width = input_shape
    sides = [height, width]
    for pad in padding:
        sides = [(side + 2 * pad - 4) // 2 for side in sides]
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=padding[0]),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5, padding=padding[1]),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * sides[0] * sides[1], hidden[0]),
        relu3=nn.ReLU(),
        drop1=nn.Dropout(dropout),
        fc2=nn.Linear(*hidden),
        relu4=nn.ReLU(),
        drop2=nn.Dropout(dropout),
        fc3=nn.Linear(hidden[1], num_classes),
    )
    if not dropout:
        del blocks["drop1"], blocks["drop2"]
    return nn.Sequential(blocks)


def cnn_femnist(input_shape: Shape, num_classes: int) -> nn.Sequential:
    """Build the CNN of the field's frameworks for FEMNIST: 1-32 k7, 32-64, FC 3136-62.

    Both convolutions keep the size; the pool after each halves it: 64 x 7 x 7 for 28x28 images.
    """
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 7, padding=3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * (height // 4) * (width // 4), num_classes),
        )
    )


def _of_torchvision(name: str, cut: int) -> ModelSpec:
    return ModelSpec(
        lambda shape, classes: vision_model(name, shape, classes),
        cut,
        pretrained=lambda: pretrained_state(name),
    )


# Default cuts: ResNets behind the first residual block, as in SplitFed (64x16x16 for 64x64 images
# with resnet18), the others behind their first pool.
MODELS: dict[str, ModelSpec] = {
    "mlp": ModelSpec(mlp, cut=3),
    "lenet5": ModelSpec(lenet5, cut=7),
    "cnn-mnist": ModelSpec(cnn_mnist, cut=3),
    "cnn-cifar10": ModelSpec(cnn_cifar10, cut=3),
    "cnn-femnist": ModelSpec(cnn_femnist, cut=3),
    "alexnet": _of_torchvision("alexnet", cut=3),
    "vgg16": _of_torchvision("vgg16", cut=5),
    "resnet18": _of_torchvision("resnet18", cut=5),
    "resnet50": _of_torchvision("resnet50", cut=5),
}


def model_spec(name: str, allowed: Collection[str] | None = None) -> ModelSpec:
    """Return the model with this name; see ``registry.look_up`` for ``allowed`` and errors."""

    def own(function: Callable[..., object]) -> ModelSpec:
        return ModelSpec(cast(Callable[[Shape, int], nn.Sequential], function), cut=None)

    return look_up("model", name, MODELS, own, allowed)


def build(spec: ModelSpec, input_shape: Shape, num_classes: int, *, seed: int) -> nn.Sequential:
    """Build a model on the CPU, with initial weights that depend only on the seed.

    Raises:
        ConfigError: the model cannot be built for such data, or is not a plain row of blocks.
    """
    return check_row(make_model(spec, input_shape, num_classes, seed=seed))


def make_model(spec: ModelSpec, input_shape: Shape, num_classes: int, *, seed: int) -> nn.Module:
    """Return the result of a model's function, on the default device.

    Raises:
        ConfigError: the function fails for such data.
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(seed, seeds.INITIAL_WEIGHTS))
        try:
            model: nn.Module = spec.build(input_shape, num_classes)
        except (Exception, SystemExit) as error:  # a user's own function
            raise ConfigError(
                f"the model cannot be built for samples of shape {list(input_shape)}"
                f" and {num_classes} classes: {told(error)}"
            ) from error
        finally:
            torch.set_default_dtype(dtype)  # a user's own function may have changed it
    return model


def split(model: nn.Sequential, *cuts: int) -> list[nn.Sequential]:
    """Return the segments of a model, one more than cuts; they share its parameters.

    In-place modules in the blocks next to a cut get ``inplace=False``: behind it they would
    overwrite the received activations, in front of it the tensor that is being sent.

    Raises:
        ConfigError: a cut is outside the model, cuts are out of order, or the model is not a plain
            row of blocks.
    """
    check_row(model)
    bounds = [0, *cuts, len(model)]
    if bounds != sorted(bounds):
        raise ConfigError(
            f"cut {', '.join(map(str, cuts))}: this model has {len(model)} blocks"
            f" ({', '.join(names_of(model))});"
            f" cuts lie between 0 and {len(model)}, in order"
        )
    for cut in cuts:
        for block in list(model)[max(cut - 1, 0) : cut + 1]:
            for module in block.modules():
                if getattr(module, "inplace", False):
                    module.inplace = False  # type: ignore[assignment]
    # Plain rows: the constructor of a subclass may take other arguments.
    blocks = [(name, model[index]) for index, name in enumerate(names_of(model))]
    return [nn.Sequential(OrderedDict(blocks[a:b])) for a, b in itertools.pairwise(bounds)]
