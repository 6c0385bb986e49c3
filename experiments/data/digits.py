"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from .registry import Tensors, register


@register("digits", cached=False)
def digits(root: Path) -> Tensors:
    """1,797 digits of 8×8 pixels, resized to 28×28; a fifth of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    original = load_digits()
    images = torch.tensor(original.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().to(torch.uint8)
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=original.target)
    labels = torch.tensor(original.target, dtype=torch.long)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }
