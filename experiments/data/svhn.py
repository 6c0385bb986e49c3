"""SVHN (Netzer et al., 2011), house numbers seen from the street."""

from __future__ import annotations

from pathlib import Path

from .registry import Tensors, register, tensors
from .torchvision_sets import train_and_test


@register("svhn")
def svhn(root: Path) -> Tensors:
    """73,257 + 26,032 colour images of 32×32 pixels with a digit in the middle; the extra training set is left out."""
    train, test = ((part.data, part.labels) for part in train_and_test("SVHN", root))
    return tensors(train, test)
