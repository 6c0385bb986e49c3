"""Restricted Boltzmann machines on binary pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from bioopt.nn import RBM

from .shapes import Shape


class ToUnitInterval(nn.Module):
    """Standardised images scaled back to [0, 1], by the smallest and the largest value seen in training."""

    def __init__(self) -> None:
        super().__init__()
        self.least: torch.Tensor
        self.largest: torch.Tensor
        self.register_buffer("least", torch.tensor(math.inf))
        self.register_buffer("largest", torch.tensor(-math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        if self.training:
            least, largest = torch.aminmax(x.detach())
            self.least.copy_(torch.minimum(self.least, least))
            self.largest.copy_(torch.maximum(self.largest, largest))
        return ((x - self.least) / (self.largest - self.least).clamp(min=1e-12)).clamp(0, 1)


class Binarize(nn.Module):
    """In training, each pixel is 1 with its value as the probability and else 0, drawn anew each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        return torch.bernoulli(x) if self.training else x


def rbm(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """A stack of restricted Boltzmann machines on binary pixels, and a linear readout of the last.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        hidden: the number of hidden units of each machine, from the first to the last.
    """
    sizes = [math.prod(shape), *hidden]
    machines = [RBM(visible, units) for visible, units in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), ToUnitInterval(), Binarize(), *machines, nn.Linear(sizes[-1], classes))
