"""The convolutional network of SoftHebb (Journé et al., 2023), and what helps beyond it."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import require_counts
from .layers import Power, QuickDropout, Triangle
from .shapes import Shape
from .whitening import WhitenedPatches


class OnOff(nn.Module):
    """Neurons in pairs, one for each sign: ``relu(u - threshold)`` and ``relu(-u - threshold)``, one after another."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """N×C×… to N×2C×…."""
        return torch.cat([torch.relu(u - self.threshold), torch.relu(-u - self.threshold)], 1)

    def extra_repr(self) -> str:
        """Its threshold."""
        return f"threshold={self.threshold:g}"


class WideBlock(nn.Sequential):
    """A layer of very many neurons, named ``patches``, ``conv``, ``norm``, ``active``, ``pool`` and ``power``.

    ``conv`` learns from every third patch in each direction, since neighbours are nearly equal. Frozen, it sees all
    patches, an image and a few neurons at a time, so that their activity stays in the processor's cache; whitening and
    normalisation are then part of its weights.

    Args:
        channels: of an image.
        neurons: of ``conv``; each gives two features a place, one for each sign.
        size: of a side of a patch, in pixels.
        threshold: from which on a neuron is active, in standard deviations of its weighted input.
        pool: places in each direction, over which activity is averaged.
    """

    CACHED, ON_GPU = 2**19, 2**28  # activities at a time

    patches: WhitenedPatches
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    active: OnOff
    pool: nn.AdaptiveAvgPool2d
    power: Power

    def __init__(self, channels: int, neurons: int, *, size: int = 6, threshold: float = 1.5, pool: int = 3) -> None:
        patches = WhitenedPatches(channels, size)
        layers = OrderedDict[str, nn.Module](
            patches=patches,
            conv=_scaled(nn.Conv2d(patches.pixels, neurons, 1, bias=False)),
            norm=nn.BatchNorm2d(neurons, affine=False),
            active=OnOff(threshold),
            pool=nn.AdaptiveAvgPool2d(pool),
            power=Power(0.7),
        )
        super().__init__(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W to features N×2·neurons×pool×pool."""
        self.conv.stride = (3, 3) if self.training else (1, 1)
        if not self.training:
            return self._frozen(x)
        for layer in self:
            x = layer(x)
        return x

    def _frozen(self, x: torch.Tensor) -> torch.Tensor:
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        with torch.autocast(x.device.type, enabled=False):
            deviation = (self.norm.running_var + self.norm.eps).sqrt()
            weight = (self.conv.weight.flatten(1) @ self.patches.filter) / deviation.unsqueeze(1)
            weight = weight - weight.mean(1, keepdim=True)  # in place of each patch's mean
            offset = self.norm.running_mean / deviation
            weight = torch.cat([weight, -weight]).to(kind)
            bias = torch.cat([-offset, offset]) - self.active.threshold
            gain = self.patches.gain(x).unsqueeze(1).to(kind)
            patches = (F.unfold(x.to(kind), self.patches.size) * gain).transpose(1, 2)
            positions, inputs = patches.shape[1:]
            # Rows of a multiple of 32 numbers, one after another, are multiplied fastest; and a bias that is the weight
            # of an input of 1 takes no pass of its own over all activities.
            unused = -(inputs + 1) % 32
            seen = F.pad(patches, (0, 1 + unused))
            seen[..., inputs] = 1
            weight = F.pad(torch.cat([weight, bias.to(kind).unsqueeze(1)], 1), (0, unused))
            width = x.shape[3] - self.patches.size + 1
            places = torch.eye(positions, device=x.device).view(positions, 1, -1, width)
            pooling = self.pool(places).flatten(1).T.to(kind)
            most = max(1, (self.CACHED if x.device.type == "cpu" else self.ON_GPU) // positions)
            rows = weight.split(max(1, most // 64 * 64))
            features = [
                torch.cat([pooling @ torch.relu_(F.linear(part, w)).view(-1, positions, len(w)) for w in rows], 2)
                for part in (few.flatten(0, 1) for few in seen.split(max(1, most // len(weight))))
            ]
            pooled: torch.Tensor = self.power(torch.cat(features).transpose(1, 2).contiguous())
            side = math.isqrt(pooled.shape[2])
        return pooled.view(*pooled.shape[:2], side, side)


class Trunk(nn.Module):
    """Blocks one after another, and blocks parallel to them that see the image too; their outputs are concatenated.

    Args:
        serial: the blocks one after another; the output of the last is a feature of the image, or of ``all_blocks``.
        parallel: the blocks parallel to them.
        all_blocks: whether the outputs of all serial blocks are features, pooled to the size of the last.
        mirror: whether evaluation averages the output over an image and its mirror image.
    """

    def __init__(
        self, serial: dict[str, nn.Module], parallel: dict[str, nn.Module], all_blocks: bool, mirror: bool
    ) -> None:
        super().__init__()
        for name, block in (serial | parallel).items():
            self.add_module(name, block)
        self.serial, self.parallel = list(serial), list(parallel)
        self.all_blocks = all_blocks
        self.mirror = mirror

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W to features N×F."""
        if self.mirror and not self.training:
            return (self._features(x) + self._features(x.flip(3))) / 2
        return self._features(x)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        parallel = [self.get_submodule(name)(x).flatten(1) for name in self.parallel]
        outputs = []
        for name in self.serial:
            x = self.get_submodule(name)(x)
            outputs.append(x)
        size = (x.shape[2], x.shape[3])
        outputs = outputs if self.all_blocks else outputs[-1:]
        return torch.cat([F.adaptive_avg_pool2d(y, size).flatten(1) for y in outputs] + parallel, 1)

    def extra_repr(self) -> str:
        """Its options."""
        return f"all_blocks={self.all_blocks}, mirror={self.mirror}"


def softhebb(
    shape: Shape,
    classes: int,
    *,
    width: float = 1.0,
    whitened: int = 0,
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
        whitened: number of neurons, parallel to the blocks, that see whitened patches of 6×6 pixels: see `WideBlock`.
        readout_sees: the output of the ``"last"`` block, as published, or of ``"all"`` blocks.
        mirror: whether a trunk in evaluation mode averages over an image and its mirror image.
        normalise: whether each feature is normalised to zero mean and unit variance before the readout.
        dropout: before the readout.
    """
    channels, height, wide = shape
    if min(height, wide) < 8:
        raise ValueError(f"model=softhebb pools three times, so it needs images of at least 8×8, not {height}×{wide}")
    require_counts(0, of="model.", whitened=whitened)
    if not width > 0:
        raise ValueError(f"model.width={width} must be > 0")
    if readout_sees not in ("last", "all"):
        raise ValueError(f"model.readout_sees={readout_sees} must be last or all")
    all_blocks = readout_sees == "all"
    one, two, three = (max(2, round(width * n)) for n in (96, 384, 1536))
    serial: dict[str, nn.Module] = {
        "block1": _soft_block(channels, one, 5, 0.7, _max_of_four()),
        "block2": _soft_block(one, two, 3, 1.4, _max_of_four()),
        "block3": _soft_block(two, three, 3, 1.0, nn.AvgPool2d(2)),
    }
    parallel: dict[str, nn.Module] = {}
    if whitened:
        parallel["whitened"] = WideBlock(channels, whitened)
    features = (one + two + three if all_blocks else three) * (height // 8) * (wide // 8) + whitened * 18
    readout = nn.Linear(features, classes)
    if normalise:
        nn.init.zeros_(readout.weight)
    else:  # as published, for 24,576 features at full width
        nn.init.uniform_(readout.weight, 0, 0.1105 * math.sqrt(24576 / features))
    norm = {"norm": nn.BatchNorm1d(features, affine=False)} if normalise else {}
    head = {**norm, "dropout": QuickDropout(dropout), "readout": readout}
    return nn.Sequential(OrderedDict({"trunk": Trunk(serial, parallel, all_blocks, mirror), **head}))


def _soft_block(inputs: int, outputs: int, kernel: int, power: float, pool: nn.Module) -> nn.Module:
    conv = _scaled(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=False))
    block = OrderedDict(norm=nn.BatchNorm2d(inputs, affine=False), conv=conv, active=Triangle(), pool=pool)
    if power != 1:
        block["power"] = Power(power)  # after the pooling, whose maximum it does not change: a quarter of the work
    return nn.Sequential(block)


def _max_of_four() -> nn.Module:
    """``nn.MaxPool2d(4, 2, 1)``, in two steps of less work."""
    return nn.Sequential(nn.MaxPool2d(2, 2, 1), nn.MaxPool2d(2, 1))


def _scaled(conv: nn.Conv2d) -> nn.Conv2d:
    """Weight vectors of L2 norm 25, as published."""
    nn.init.normal_(conv.weight, std=25 / math.sqrt(conv.weight[0].numel()))
    return conv
