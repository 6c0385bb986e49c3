"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey images of 28×28 pixels."""

from __future__ import annotations

from pathlib import Path

from .registry import Tensors, register, tensors
from .torchvision_sets import train_and_test


@register("mnist")
def mnist(root: Path) -> Tensors:
    """Handwritten digits."""
    return _load("MNIST", root)


@register("fashion_mnist")
def fashion_mnist(root: Path) -> Tensors:
    """Articles of clothing."""
    return _load("FashionMNIST", root)


def _load(class_name: str, root: Path) -> Tensors:
    try:
        train, test = ((part.data[:, None], part.targets) for part in train_and_test(class_name, root))
    except Exception as error:
        originals = root / class_name
        if any(originals.rglob("*-ubyte")):  # torchvision checks that they are there, but not what is in them
            error.add_note(f"If {originals} is damaged, delete it and run again.")
        raise
    return tensors(train, test)
