"""Networks of the VGG kind: convolutions of 3×3, each with a nonlinearity and pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..checks import require_counts
from .shapes import Shape

POOLING: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


def vgg(shape: Shape, classes: int, *, channels: Sequence[int], pooling: str = "max") -> nn.Module:
    """Convolutions of 3×3 with ReLU, each of which halves the image by pooling, and a linear readout.

    Four convolutions of 128, 256, 512 and 512 channels are VGG-5 of the benchmarks of predictive coding (Pinchetti et
    al., 2025).

    Args:
        shape: of an image.
        classes: outputs.
        channels: of the convolutions.
        pooling: ``"max"`` or ``"average"``.
    """
    if not isinstance(channels, Sequence) or not channels:
        raise ValueError(f"model.channels={channels} must be a list of integers >= 1, such as [32, 64]")
    for count in channels:
        require_counts(of="model.", channels=count)
    if pooling not in POOLING:
        raise ValueError(f"model.pooling={pooling} must be one of {', '.join(POOLING)}")
    inputs, height, wide = shape
    if min(height, wide) < 2 ** len(channels):
        raise ValueError(
            f"model=vgg halves images {len(channels)} times, which those of {height}×{wide} pixels are too small for: "
            "give model.channels fewer entries"
        )
    layers: list[nn.Module] = []
    for outputs in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), POOLING[pooling](2)]
        inputs, height, wide = outputs, height // 2, wide // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * height * wide, classes))
