"""Attention among the patches of an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from bioopt.nn import Attention

from ..checks import require_counts
from .shapes import Shape


class Patches(nn.Module):
    """The patches of an image: N×C×H×W to N × patches × values of a patch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W whose sides are multiples of ``size``."""
        return F.unfold(x, self.size, stride=self.size).transpose(1, 2)

    def extra_repr(self) -> str:
        """Its option."""
        return f"size={self.size}"


class PositionalEncoding(nn.Module):
    """Adds a code of each position: sines and cosines of many wavelengths (Vaswani et al., 2017)."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.code: torch.Tensor
        position, wave = torch.arange(count).unsqueeze(1), torch.arange(0, size, 2)
        angle = position * torch.exp(-wave * (math.log(10_000) / size))
        self.register_buffer("code", torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :size])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape, N × positions × size."""
        return x + self.code


class Residual(nn.Sequential):
    """A block that adds to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        y = x
        for module in self:
            y = module(y)
        return x + y


def attention(shape: Shape, classes: int, *, patch: int, size: int, heads: int, hidden: int, blocks: int) -> nn.Module:
    """Attention among the patches of an image, and a linear readout of all of them.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        patch: pixels of a patch's side; height and width must be multiples of it.
        size: neurons per patch.
        heads: number of attention heads; ``size`` must be a multiple of it.
        hidden: neurons, per patch, of the ReLU layer after attention.
        blocks: number of blocks of attention and ReLU layer.
    """
    channels, height, wide = shape
    require_counts(of="model.", patch=patch, size=size, heads=heads, hidden=hidden, blocks=blocks)
    if height % patch or wide % patch:
        fitting = [side for side in range(1, min(height, wide) + 1) if not height % side and not wide % side]
        nearest = min(fitting, key=lambda side: abs(side - patch))
        raise ValueError(
            f"model.patch={patch} must divide the image, of {height}×{wide} pixels, as model.patch={nearest} does"
        )

    count = (height // patch) * (wide // patch)

    def norm() -> nn.Module:
        return nn.LayerNorm(size, elementwise_affine=False)

    layers: list[nn.Module] = [
        Patches(patch),
        nn.Linear(channels * patch**2, size),
        PositionalEncoding(count, size),
    ]
    for _ in range(blocks):
        layers.append(Residual(norm(), Attention(size, heads)))
        layers.append(Residual(norm(), nn.Linear(size, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, size)))
    return nn.Sequential(*layers, norm(), nn.Flatten(), nn.Linear(count * size, classes))
