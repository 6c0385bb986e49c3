"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .shapes import Shape


def mlp(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """A multilayer perceptron with ReLU."""
    return nn.Sequential(nn.Flatten(), *perceptron(math.prod(shape), hidden, classes))


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> list[nn.Module]:
    """Its layers: linear ones, with ReLU between them."""
    if not isinstance(hidden, Sequence) or not all(isinstance(size, int) and size > 0 for size in hidden):
        raise ValueError(f"model.hidden={hidden} must be a list of integers >= 1, such as [128]")
    layers: list[nn.Module] = []
    for size, following in pairwise([inputs, *hidden, outputs]):
        layers += [nn.Linear(size, following), nn.ReLU(inplace=True)]
    return layers[:-1]
