"""A trained network for use outside of experiments: from pixels, in one file of half precision."""

from __future__ import annotations

import io
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """``(x - mean) / deviation`` of each channel of images N×C×H×W, which are pixels from 0 to 1.

    Args:
        mean: of each channel, over the images that the network was trained on.
        deviation: the same; infinite where a channel is constant, which becomes zeros.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("deviation", deviation.detach().clone().view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images of zero mean and unit variance."""
        return (x - self.mean) / self.deviation


def from_pixels(network: nn.Module, mean: Tensor, deviation: Tensor) -> nn.Sequential:
    """A network in evaluation mode, whose parts are ``standardise``, ``trunk`` and ``readout``.

    Its inputs are pixels from 0 to 1, N×C×H×W, and its outputs the scores of classes. The features of images are
    ``model.trunk(model.standardise(images))``. Modules are shared with ``network``.

    Raises:
        ValueError: the network is not an ``nn.Sequential`` that ends with its readout, a Linear.
    """
    if not isinstance(network, nn.Sequential) or not len(network) or not isinstance(network[-1], nn.Linear):
        raise ValueError(
            f"{type(network).__name__} has no trunk and readout: they need an nn.Sequential that ends with a Linear"
        )
    parts = {"standardise": Standardise(mean, deviation), "trunk": network[:-1], "readout": network[-1]}
    return nn.Sequential(OrderedDict(parts)).eval()


def packed(model: nn.Sequential, network: dict[str, Any], shape: Sequence[int], classes: int) -> bytes:
    """A file of what `from_pixels` returned, its weights in half precision.

    Args:
        model: of `from_pixels`.
        network: its options, with the name of its function in `experiments.models` as ``name``.
        shape: channels, height and width of an image.
        classes: its outputs.
    """
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    standardise = model[0]
    assert isinstance(standardise, Standardise)
    scale = {"mean": standardise.mean.flatten(), "deviation": standardise.deviation.flatten()}
    file = io.BytesIO()
    torch.save({"network": network, "shape": list(shape), "classes": classes, **scale, "state": state}, file)
    return file.getvalue()


def unpacked(path: Path, *, pretrained: bool = True) -> nn.Sequential:
    """The network of a file, in single precision and evaluation mode, as `from_pixels` returns it.

    Args:
        path: of the file, as written from `packed`.
        pretrained: with its weights; otherwise with random ones from torch's generator.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    options = dict(found["network"])
    build = getattr(sys.modules[__package__], options.pop("name"))
    model = from_pixels(build(tuple(found["shape"]), found["classes"], **options), found["mean"], found["deviation"])
    if pretrained:
        model.load_state_dict(found["state"])
    return model
