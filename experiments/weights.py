"""What finished runs have learned, for use outside of experiments: `hubconf.py` and `scripts/keep_weights.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import nn

from . import data
from .building import build_model
from .config import read
from .models.pixels import from_pixels
from .runs import Progress


def network_of(folder: Path) -> tuple[nn.Sequential, DictConfig, data.Images]:
    """The network of a finished run, as `from_pixels` returns it, with the run's options and its data set.

    Of rules that predict in a way of their own, the network alone is not what was tested, so that it is refused.

    Raises:
        ValueError: it is not a finished run of image classification, or its network has no trunk and readout.
        FileNotFoundError: its data set, which has the shape and scale of images, is not there.
    """
    if not (folder / "summary.json").exists() or not (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} is not the folder of a finished run: it has no summary.json and checkpoint.pt")
    config = read(folder)
    if config.task is not None:
        raise ValueError(f"{folder} is a run of experiment={config.task.name}, which leaves no network")
    rule = get_object(config.optimizer._target_) if "_target_" in config.optimizer else None
    if any(hasattr(rule, name) for name in ("predict", "relaxed")):
        raise ValueError(f"{folder}: optimizer={config.optimizer.name} predicts in a way of its own")
    images = data.from_config(config.data)
    if config.data.validation:
        images = images.hold_out(config.data.validation)
    network = build_model(config, images)
    network.load_state_dict(Progress.load(folder, torch.device("cpu")).state["model"])
    return from_pixels(network, images.mean, images.std), config, images


@torch.no_grad()
def accuracy_of(model: nn.Module, images: data.Images) -> float:
    """The share of test images that a network from pixels assigns to their class."""
    parts = zip(images.test_images.split(1000), images.test_labels.split(1000), strict=True)
    return sum(int((model(x / 255).argmax(1) == y).sum()) for x, y in parts) / len(images.test_labels)
