"""One wide hidden layer of neurons that compete, as in the papers of Krotov & Hopfield and of SoftHebb."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import require_counts
from .rbm import ToUnitInterval
from .shapes import Shape


class CompetingLayer(nn.Module):
    """A linear layer, and the activity that its readout receives.

    Args:
        inputs: pixels of an image.
        neurons: their number.
        radius: L2 norm of a neuron's initial weights.
        unit_images: whether each image is scaled to length 1 before the layer.
        activation: ``"power"``: the cosine between image and weights, where it is above 0, to this power;
            ``"softmax"``: a softmax over neurons of this inverse temperature.
        sharpness: the power, or the inverse temperature.

    Activity is scaled to mean 0 and deviation 1 over all neurons together, so that the readout's rate fits any power,
    and an image that no neuron knows stays weak.
    """

    def __init__(
        self,
        inputs: int,
        neurons: int,
        radius: float,
        unit_images: bool,
        activation: str,
        sharpness: float,
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, neurons, bias=False)
        nn.init.normal_(self.fc.weight, std=radius / math.sqrt(inputs))
        self.unit_images, self.activation, self.sharpness = unit_images, activation, sharpness
        self.scale = nn.BatchNorm1d(1, eps=1e-20, affine=False)
        # The variance of random weights' activity to a power is minute, so that its running mean starts at 0, not at 1.
        assert self.scale.running_var is not None
        nn.init.zeros_(self.scale.running_var)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×pixels to activity N×neurons."""
        u: torch.Tensor = self.fc(F.normalize(x, dim=1) if self.unit_images else x).float()
        if self.activation == "softmax":
            y = (self.sharpness * u).softmax(1)
        else:
            lengths = x.norm(dim=1, keepdim=True) if not self.unit_images else 1
            cosine = u / (self.fc.weight.detach().norm(dim=1) * lengths).clamp(min=1e-12)
            y = torch.relu(cosine).pow(self.sharpness)
        scaled: torch.Tensor = self.scale(y.unsqueeze(1)).squeeze(1)
        return scaled

    def extra_repr(self) -> str:
        """Its options."""
        return f"unit_images={self.unit_images}, activation={self.activation}, sharpness={self.sharpness:g}"


def wide(
    shape: Shape,
    classes: int,
    *,
    hidden: int,
    radius: float,
    unit_images: bool,
    activation: str,
    sharpness: float,
    dropout: float = 0.0,
) -> nn.Module:
    """One wide layer of neurons that compete, on pixels in [0, 1], and a linear readout.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        hidden: number of neurons.
        radius: as of `CompetingLayer`.
        unit_images: as of `CompetingLayer`.
        activation: as of `CompetingLayer`.
        sharpness: as of `CompetingLayer`.
        dropout: before the readout.
    """
    require_counts(of="model.", hidden=hidden)
    if activation not in ("power", "softmax"):
        raise ValueError(f"model.activation={activation} must be power or softmax")
    for name, value in {"radius": radius, "sharpness": sharpness}.items():
        if not value > 0:
            raise ValueError(f"model.{name}={value} must be > 0")
    layer = CompetingLayer(math.prod(shape), hidden, radius, unit_images, activation, sharpness)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            grey=ToUnitInterval(),
            layer=layer,
            dropout=nn.Dropout(dropout),
            readout=nn.Linear(hidden, classes),
        )
    )
