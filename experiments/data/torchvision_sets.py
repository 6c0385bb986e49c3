"""Data sets of torchvision, downloaded where their files are missing."""

from __future__ import annotations

import contextlib
import inspect
import io
from pathlib import Path
from typing import Any


def train_and_test(class_name: str, root: Path) -> tuple[Any, Any]:
    """The training and the test part of a data set, as objects of its class in `torchvision.datasets`."""
    import torchvision  # takes a second to import, and is only needed before the tensors are cached

    source = getattr(torchvision.datasets, class_name)
    if "split" in inspect.signature(source).parameters:
        options: list[dict[str, Any]] = [{"split": "train"}, {"split": "test"}]
    else:
        options = [{"train": True}, {"train": False}]
    with contextlib.redirect_stdout(io.StringIO()):
        train, test = (source(root, download=True, **chosen) for chosen in options)
    return train, test
