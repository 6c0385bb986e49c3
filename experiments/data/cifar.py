"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 colour images of 32×32 pixels."""

from __future__ import annotations

from pathlib import Path

import torch

from .registry import Tensors, register, tensors
from .torchvision_sets import train_and_test


@register("cifar10")
def cifar10(root: Path) -> Tensors:
    """Ten classes of animals and vehicles."""
    return _load("CIFAR10", root)


@register("cifar100")
def cifar100(root: Path) -> Tensors:
    """A hundred classes, of 500 training images each."""
    return _load("CIFAR100", root)


def _load(class_name: str, root: Path) -> Tensors:
    parts = train_and_test(class_name, root)
    train, test = ((torch.as_tensor(part.data).permute(0, 3, 1, 2), part.targets) for part in parts)
    return tensors(train, test)
