"""STL-10 (Coates, Ng & Lee, 2011), few labelled images, and larger ones than CIFAR-10's."""

from __future__ import annotations

from pathlib import Path

from .registry import Tensors, register, tensors
from .torchvision_sets import train_and_test


@register("stl10")
def stl10(root: Path) -> Tensors:
    """5,000 + 8,000 colour images of 96×96 pixels, ten classes; the 100,000 unlabelled images are left out."""
    train, test = ((part.data, part.labels) for part in train_and_test("STL10", root))
    return tensors(train, test)
