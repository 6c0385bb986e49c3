"""A residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Shape


class BasicBlock(nn.Module):
    """Two convolutions with batch norm, and a connection past them, with one convolution where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's activity."""
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x), inplace=True)


def resnet(shape: Shape, classes: int, width: int = 16, blocks: Sequence[int] = (1, 1, 1)) -> nn.Sequential:
    """The residual network of He et al. (2016) for small images.

    Args:
        shape: of an image.
        classes: their number.
        width: channels of the first stage; each further stage has twice as many, and half the height and width.
        blocks: the number of residual blocks in each stage; ``(3, 3, 3)``: ResNet-20.
    """
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(shape[0], width, 3, padding=1, bias=False))
    model.add_module("norm", nn.BatchNorm2d(width))
    model.add_module("relu", nn.ReLU(inplace=True))
    inputs, count = width, 0
    for stage, number in enumerate(blocks):
        outputs = width * 2**stage
        for i in range(number):
            count += 1
            model.add_module(f"block{count}", BasicBlock(inputs, outputs, 2 if stage and not i else 1))
            inputs = outputs
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("readout", nn.Linear(inputs, classes))
    return model
