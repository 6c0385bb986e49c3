"""LeNet-5 (LeCun et al., 1998)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .shapes import Shape


def lenet5(
    shape: Shape, classes: int, channels: Sequence[int] = (6, 16), hidden: Sequence[int] = (120, 84)
) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, for 28×28 and 32×32 images.

    Args:
        shape: of an image.
        classes: their number.
        channels: of the two convolutions.
        hidden: neurons of the two linear layers.
    """
    inputs, height, wide = shape
    if len(channels) != 2 or len(hidden) != 2:
        raise ValueError(f"model.channels={list(channels)} and model.hidden={list(hidden)} must have two numbers each")
    (first, second), (third, fourth) = channels, hidden
    size = [((side + 2 * 2 - 4) // 2 - 4) // 2 for side in (height, wide)]
    if min(size) < 1:
        raise ValueError(f"model=lenet5 needs images of at least 12×12 pixels, not {height}×{wide}")
    return nn.Sequential(
        nn.Conv2d(inputs, first, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * size[0] * size[1], third),
        nn.ReLU(inplace=True),
        nn.Linear(third, fourth),
        nn.ReLU(inplace=True),
        nn.Linear(fourth, classes),
    )
