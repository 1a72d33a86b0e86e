"""torchvision's networks as rows of named blocks that can be cut at every index.

Weights are initialised as in torchvision, not downloaded. The first convolution has as many input
channels as the data; all else is as in torchvision.
"""

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network's single layers and residual blocks, in the order of its forward pass."""
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential):
            yield from ((f"{name}_{index}", block) for index, block in child.named_children())
        else:
            yield name, child


def _take_channels(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a convolution like this one for another number of channels."""
    if convolution.in_channels == channels:
        return convolution
    return nn.Conv2d(
        channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
    )


def vision_model(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Return a network of torchvision's as a row of blocks, flattened before its classifier."""
    from torchvision import models  # takes seconds to import

    network = getattr(models, name)(weights=None, num_classes=num_classes)
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for block_name, block in _blocks(network):
        if block_name in ("classifier_0", "fc"):
            blocks["flatten"] = nn.Flatten()
        blocks[block_name] = block
    first = next(iter(blocks))
    convolution = blocks[first]
    assert isinstance(convolution, nn.Conv2d)
    blocks[first] = _take_channels(convolution, input_shape[0])
    return nn.Sequential(blocks)
