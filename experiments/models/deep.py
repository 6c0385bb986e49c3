"""A deep residual multilayer perceptron."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import require_counts
from .shapes import Shape

WEIGHTS = ("standard", "mu_p")


class Skip(nn.Module):
    """A linear layer of ReLU activity, and a connection past it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` plus what the layer makes of it."""
        y: Tensor = x + self.layer(F.relu(x))
        return y


def deep(shape: Shape, classes: int, *, width: int, depth: int, weights: str = "standard") -> nn.Module:
    r"""A residual multilayer perceptron with as many layers as wanted.

    Args:
        shape: of an image.
        classes: outputs.
        width: neurons of each hidden layer.
        depth: the number of layers, the readout included.
        weights: at the start: ``"standard"``, those of torch; ``"mu_p"``, normal with the deviations of depth-μP,
            :math:`1/\sqrt{D}` of the first layer, for :math:`D` inputs, :math:`1/\sqrt{N L}` of the residual ones, for
            :math:`N` neurons and :math:`L` layers, and :math:`1/N` of the readout, without biases (Yang et al., 2024).
    """
    require_counts(of="model.", width=width)
    require_counts(2, of="model.", depth=depth)
    if weights not in WEIGHTS:
        raise ValueError(f"model.weights={weights} must be one of {', '.join(WEIGHTS)}")
    inputs = math.prod(shape)
    first, readout = nn.Linear(inputs, width), nn.Linear(width, classes)
    blocks = [Skip(width) for _ in range(depth - 2)]
    if weights == "mu_p":
        deviations = {first: inputs**-0.5, readout: 1 / width} | {b.layer: (width * depth) ** -0.5 for b in blocks}
        with torch.no_grad():
            for layer, deviation in deviations.items():
                layer.weight.normal_(0, deviation)
                layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, *blocks, nn.ReLU(), readout)
