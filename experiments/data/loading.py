"""Loading a data set by its name or its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cache
from .checks import SPLITS, check_returned
from .images import Images
from .registry import DATA_SETS


def load(name: str, root: str | Path, device: torch.device | str = "cpu", size: int | None = None) -> Images:
    """Load a data set, fetching it first where its file is missing.

    Args:
        name: of a registered data set, or of a file ``<root>/<name>.safetensors``.
        root: the folder of data sets; ``~`` is the home folder.
        device: where the images are kept.
        size: pixels to which the shorter side of the images is scaled; ``None`` leaves them as they are.

    Raises:
        FileNotFoundError: its file is missing and could not be fetched.
        ValueError: its file is damaged, nothing can be learned from it, or there is no such data set.
    """
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"data.size={size} must be an integer >= 1, or null for the original size")
    if not isinstance(root, str | Path):
        raise ValueError(f"data.root={root} must be a folder")
    root = Path(root).expanduser()  # no shell has replaced the "~" of "data.root=~"
    if name in DATA_SETS and not DATA_SETS[name].cached:
        source, (tensors, warnings) = "its loader", check_returned(name, DATA_SETS[name].loader(root))
    else:
        source, (tensors, warnings) = str(cache.file_of(name, root)), cache.read(name, root)
    for warning in warnings:
        print(f"warning: data set '{name}', {source}: {warning}", flush=True)
    if size is not None:
        tensors |= {key: scaled(tensors[key], size) for key in ("train_images", "test_images")}
    return Images(name, **{key: tensors[key].to(device) for key in SPLITS})


def from_config(config: Any, device: torch.device | str = "cpu") -> Images:
    """Load the data set of a run's options ``data``."""
    return load(config.name, config.root, device, config.get("size"))


def scaled(images: Tensor, size: int) -> Tensor:
    """Images uint8, N×C×H×W, scaled so that their shorter side has ``size`` pixels."""
    height, width = images.shape[2:]
    shorter = min(height, width)
    if shorter == size:
        return images
    shape = [round(side * size / shorter) for side in (height, width)]
    # In parts, since floats take four times the memory.
    parts = [F.interpolate(part.float(), shape, mode="bilinear", antialias=True) for part in images.split(1000)]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
