"""The networks: ordinary modules that know nothing of the rule that trains them, and the random-trunk control."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from bioopt.recorder import find_synapses

Shape = tuple[int, int, int]


def cnn(shape: Shape, classes: int, *, width: int, kernel: int) -> nn.Module:
    """Two convolutions and a linear readout; what enters a layer is normalised, so that any rule finds its scale."""
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
        nn.Linear(2 * width * (height // 4) * (wide // 4), classes),
    )


def mlp(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """A multilayer perceptron with ReLU."""
    sizes = [shape[0] * shape[1] * shape[2], *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def lenet5(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, for 28×28 and 32×32 images."""
    channels, height, wide = shape
    size = [((side + 2 * 2 - 4) // 2 - 4) // 2 for side in (height, wide)]
    if min(size) < 1:
        raise ValueError(f"model=lenet5 needs images of at least 12×12 pixels, not {height}×{wide}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * size[0] * size[1], 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, classes),
    )


def random_trunk(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The control: freeze everything but the last synapse at its random start, and train that one by SGD.

    A synaptic rule with ``readout="delta"`` trains its readout in the very same way, so that what it gains over this
    is what its trunk has learned.
    """
    readout = find_synapses(model)[-1]
    model.requires_grad_(False)
    readout.layer.requires_grad_(True)
    return torch.optim.SGD(readout.layer.parameters(), lr=lr, **options)
