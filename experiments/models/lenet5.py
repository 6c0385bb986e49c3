"""LeNet-5 (LeCun et al., 1998)."""

from __future__ import annotations

from torch import nn

from .shapes import Shape


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
