"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..checks import require_counts
from .mlp import perceptron
from .shapes import Shape


def cnn(shape: Shape, classes: int, *, width: int, kernel: int, hidden: Sequence[int] = ()) -> nn.Module:
    """Two convolutions and a linear readout; the input of each layer is normalised, so that its scale suits any rule.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        width: neurons of the first convolution; the second has twice as many.
        kernel: the convolutions' size.
        hidden: neurons of linear layers with ReLU between the convolutions and the readout.
    """
    require_counts(of="model.", width=width, kernel=kernel)
    channels, height, wide = shape
    if height < 4 or wide < 4:
        raise ValueError(f"model=cnn pools twice, so it needs images of at least 4×4 pixels, not {height}×{wide}")
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(width, affine=False),
        nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(2 * width, affine=False),
        nn.Flatten(),
        *perceptron(2 * width * (height // 4) * (wide // 4), hidden, classes),
    )
