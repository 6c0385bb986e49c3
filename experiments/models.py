"""The networks: ordinary modules that know nothing of the rule that trains them, and the random-trunk control."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bioopt.recorder import find_synapses

Shape = tuple[int, int, int]


def cnn(shape: Shape, classes: int, *, width: int, kernel: int) -> nn.Module:
    """Two convolutions and a linear readout; what enters a layer is normalised, so that any rule finds its scale."""
    channels, height, wide = shape
    if height < 4 or wide < 4:
        raise ValueError(f"model=cnn pools twice, so it needs images of at least 4×4 pixels, not {height}×{wide}")
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(width, affine=False),
        nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(2 * width, affine=False),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (wide // 4), classes),
    )


def mlp(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """A multilayer perceptron with ReLU."""
    sizes = [shape[0] * shape[1] * shape[2], *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


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


class Triangle(nn.Module):
    """The Triangle activation (Coates, Ng & Lee, 2011): ``relu(u - mean over channels)``."""

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Sparse activity of ``u``'s shape: what exceeds the mean of the neurons at this position."""
        return torch.relu_(u - u.mean(1, keepdim=True))


class Power(nn.Module):
    """``x ** power`` of activity that is not negative."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        if not x.requires_grad:
            return x.pow(self.power)
        # For gradients: the slope of a power below 1 is infinite at 0.
        return x.clamp(min=1e-6).pow(self.power) * (x > 0)

    def extra_repr(self) -> str:
        """Its power."""
        return f"power={self.power}"


class QuickDropout(nn.Dropout):
    """Dropout that makes eight draws of each random number, where ``p`` is a multiple of 1/256 and no GPU helps.

    A readout of many features spends most of its time on `torch.nn.Dropout`'s draws; here they cost a tenth.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with a share ``p`` of its entries zeroed, the others scaled up by ``1 / (1 - p)``."""
        least = int(self.p * 256)
        if not self.training or x.is_cuda or least != self.p * 256 or not 0 < self.p < 1:
            return super().forward(x)
        draws = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        return x * (draws[: x.numel()].view(x.shape) >= least) * (1 / (1 - self.p))


class Blocks(nn.Sequential):
    """Blocks in a row; the output is that of the last, or of ``all`` of them, pooled alike, side by side.

    With ``mirror``, evaluation averages the output over an image and its mirror image.
    """

    def __init__(self, blocks: dict[str, nn.Module], everything: bool, mirror: bool) -> None:
        super().__init__(OrderedDict(blocks))
        self.everything = everything
        self.mirror = mirror

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W to features N×F."""
        if self.mirror and not self.training:
            return (self._features(x) + self._features(x.flip(3))) / 2
        return self._features(x)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for block in self:
            x = block(x)
            seen.append(x)
        features = seen if self.everything else seen[-1:]
        size = (x.shape[2], x.shape[3])
        return torch.cat([F.adaptive_avg_pool2d(f, size).flatten(1) for f in features], 1)

    def extra_repr(self) -> str:
        """Its options."""
        return f"everything={self.everything}, mirror={self.mirror}"


def softhebb(
    shape: Shape,
    classes: int,
    *,
    width: float = 1.0,
    readout_sees: str = "last",
    mirror: bool = False,
    normalise: bool = False,
    dropout: float = 0.5,
) -> nn.Module:
    """The three-block network of SoftHebb (Journé et al., 2023), with the published initial weights.

    Args:
        shape: channels, height, width of an image: 1×28×28 or 3×32×32 in the paper.
        classes: outputs of the readout.
        width: multiplies the 96, 384 and 1536 channels of the blocks.
        readout_sees: ``"last"``, the last block, as published, or ``"all"`` blocks.
        mirror: whether a trunk that is not learning averages over an image and its mirror image.
        normalise: whether each feature is brought to zero mean and unit variance before the readout.
        dropout: before the readout.
    """
    channels, height, wide = shape
    if min(height, wide) < 8:
        raise ValueError(f"model=softhebb pools three times, so it needs images of at least 8×8, not {height}×{wide}")
    if not width > 0:
        raise ValueError(f"model.width={width} must be > 0")
    if readout_sees not in ("last", "all"):
        raise ValueError(f"model.readout_sees={readout_sees} must be last or all")
    everything = readout_sees == "all"
    one, two, three = (max(2, round(width * n)) for n in (96, 384, 1536))
    blocks = {
        "block1": _soft_block(channels, one, 5, 0.7, nn.MaxPool2d(4, 2, 1)),
        "block2": _soft_block(one, two, 3, 1.4, nn.MaxPool2d(4, 2, 1)),
        "block3": _soft_block(two, three, 3, 1.0, nn.AvgPool2d(2)),
    }
    features = (one + two + three if everything else three) * (height // 8) * (wide // 8)
    readout = nn.Linear(features, classes)
    if normalise:
        nn.init.zeros_(readout.weight)
    else:  # as published; 24576: at full width
        nn.init.uniform_(readout.weight, 0, 0.1105 * math.sqrt(24576 / features))
    norm = {"norm": nn.BatchNorm1d(features, affine=False)} if normalise else {}
    head = {**norm, "dropout": QuickDropout(dropout), "readout": readout}
    return nn.Sequential(OrderedDict({"trunk": Blocks(blocks, everything, mirror), **head}))


def _soft_block(inputs: int, outputs: int, kernel: int, power: float, pool: nn.Module) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=False)
    nn.init.normal_(conv.weight, std=25 / math.sqrt(conv.weight[0].numel()))  # vectors of length 25
    block = OrderedDict(norm=nn.BatchNorm2d(inputs, affine=False), conv=conv, active=Triangle(), pool=pool)
    if power != 1:
        block["power"] = Power(power)  # after a maximum, which it leaves the same: on a quarter of the values
    return nn.Sequential(block)


def random_trunk(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The control: freeze everything but the last synapse at its random start, and train that one by SGD.

    A synaptic rule with ``readout="delta"`` trains its readout in the very same way, so that what it gains over this
    is what its trunk has learned.
    """
    readout = find_synapses(model)[-1]
    model.requires_grad_(False)
    readout.layer.requires_grad_(True)
    return torch.optim.SGD(readout.layer.parameters(), lr=lr, **options)
