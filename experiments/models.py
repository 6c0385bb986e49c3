"""The networks: ordinary modules that know nothing of the rule that trains them, and the random-trunk control."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bioopt.nn import RBM, Attention, Gate
from bioopt import find_synapses

from .options import require_counts

Shape = tuple[int, int, int]


def cnn(shape: Shape, classes: int, *, width: int, kernel: int, hidden: Sequence[int] = ()) -> nn.Module:
    """Two convolutions and a linear readout; what enters a layer is normalised, so that any rule finds its scale.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        width: neurons of the first convolution; the second has twice as many.
        kernel: the convolutions' size.
        hidden: neurons of linear layers with ReLU between the convolutions and the readout.
    """
    require_counts(of="model.", width=width, kernel=kernel)
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
        *_perceptron(2 * width * (height // 4) * (wide // 4), hidden, classes),
    )


def mlp(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """A multilayer perceptron with ReLU."""
    return nn.Sequential(nn.Flatten(), *_perceptron(math.prod(shape), hidden, classes))


def _perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> list[nn.Module]:
    if not isinstance(hidden, Sequence) or not all(isinstance(size, int) and size > 0 for size in hidden):
        raise ValueError(f"model.hidden={hidden} must be a list of integers >= 1, such as [128]")
    layers: list[nn.Module] = []
    for size, following in pairwise([inputs, *hidden, outputs]):
        layers += [nn.Linear(size, following), nn.ReLU(inplace=True)]
    return layers[:-1]


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
        if not x.requires_grad and forward_ad.unpack_dual(x).tangent is None:
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


class Whiten(nn.Module):
    """ZCA whitening of images: takes from each pixel what its neighbourhood already says of it.

    The filter comes from the covariance of the first ``patches`` patches seen in training (Bell & Sejnowski, 1997,
    *The "independent components" of natural scenes are edge filters*); no labels and no gradients enter.
    """

    def __init__(self, channels: int, size: int = 7, floor: float = 0.1, patches: int = 200_000) -> None:
        super().__init__()
        self.size, self.floor, self.patches = size, floor, patches
        self.seen: torch.Tensor
        self.covariance: torch.Tensor
        self.filter: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        inputs = channels * size**2
        self.register_buffer("covariance", torch.zeros(inputs, inputs))
        self.register_buffer("filter", self._rows_of_centre(torch.eye(inputs)).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W of the same shape."""
        if self.training and self.seen < self.patches:
            with torch.autocast(x.device.type, enabled=False):  # sums over all patches are too much for half
                self._learn(x.to(self.covariance.dtype))
        margin = self.size // 2
        return F.conv2d(F.pad(x, [margin, margin, margin, margin], mode="reflect"), self.filter)

    @torch.no_grad()
    def _learn(self, x: torch.Tensor) -> None:
        patches = F.unfold(x, self.size, stride=3).transpose(1, 2).flatten(0, 1)
        new = patches.T @ patches, torch.tensor(len(patches), device=x.device)
        if dist.is_initialized():
            for sum_over_ranks in new:
                dist.all_reduce(sum_over_ranks)
        self.covariance += new[0]
        self.seen += new[1]
        values, vectors = torch.linalg.eigh(self.covariance / self.seen)
        self.filter.copy_(self._rows_of_centre((vectors * (values + self.floor).rsqrt()) @ vectors.T))

    def _rows_of_centre(self, matrix: torch.Tensor) -> torch.Tensor:
        """Of a matrix that maps patches to patches, what makes the pixel in their centre."""
        size, centre = self.size, self.size // 2
        return matrix.view(-1, size, size, len(matrix) // size**2, size, size)[:, centre, centre]

    def extra_repr(self) -> str:
        """Its options."""
        return f"size={self.size}, floor={self.floor}, patches={self.patches}"


class OverlappingLater(nn.Sequential):
    """A block whose ``conv`` learns from every other patch each way, since neighbours tell nearly the same.

    Once frozen it looks at all of them.
    """

    conv: nn.Conv2d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As of `torch.nn.Sequential`."""
        self.conv.stride = (2, 2) if self.training else (1, 1)
        for module in self:
            x = module(x)
        return x


class Trunk(nn.Module):
    """Blocks in a row, and blocks beside them that see the image as well; what they say of it, pooled alike.

    Args:
        row: the blocks in a row, of which the last is heard, or ``everything``.
        beside: blocks that give N×C×3×3, say, of the image.
        everything: whether all blocks of the row are heard.
        mirror: whether evaluation averages the output over an image and its mirror image.
    """

    def __init__(self, row: dict[str, nn.Module], beside: dict[str, nn.Module], everything: bool, mirror: bool) -> None:
        super().__init__()
        for name, block in (row | beside).items():
            self.add_module(name, block)
        self.row, self.beside = list(row), list(beside)
        self.everything = everything
        self.mirror = mirror

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W to features N×F."""
        if self.mirror and not self.training:
            return (self._features(x) + self._features(x.flip(3))) / 2
        return self._features(x)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        beside = [self.get_submodule(name)(x).flatten(1) for name in self.beside]
        heard = []
        for name in self.row:
            x = self.get_submodule(name)(x)
            heard.append(x)
        size = (x.shape[2], x.shape[3])
        heard = heard if self.everything else heard[-1:]
        return torch.cat([F.adaptive_avg_pool2d(h, size).flatten(1) for h in heard] + beside, 1)

    def extra_repr(self) -> str:
        """Its options."""
        return f"everything={self.everything}, mirror={self.mirror}"


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
        whitened: so many neurons beside the blocks that see the whitened image, in patches of 6×6 pixels.
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
    row: dict[str, nn.Module] = {
        "block1": _soft_block(channels, one, 5, 0.7, nn.MaxPool2d(4, 2, 1)),
        "block2": _soft_block(one, two, 3, 1.4, nn.MaxPool2d(4, 2, 1)),
        "block3": _soft_block(two, three, 3, 1.0, nn.AvgPool2d(2)),
    }
    beside: dict[str, nn.Module] = {}
    if whitened:
        beside["whitened"] = OverlappingLater(
            OrderedDict(
                whiten=Whiten(channels),
                norm=nn.BatchNorm2d(channels, affine=False),
                conv=_long(nn.Conv2d(channels, whitened, 6, bias=False)),
                active=Triangle(),
                pool=nn.AdaptiveAvgPool2d(3),
                power=Power(0.7),
            )
        )
    features = (one + two + three if everything else three) * (height // 8) * (wide // 8) + whitened * 9
    readout = nn.Linear(features, classes)
    if normalise:
        nn.init.zeros_(readout.weight)
    else:  # as published; 24576: at full width
        nn.init.uniform_(readout.weight, 0, 0.1105 * math.sqrt(24576 / features))
    norm = {"norm": nn.BatchNorm1d(features, affine=False)} if normalise else {}
    head = {**norm, "dropout": QuickDropout(dropout), "readout": readout}
    return nn.Sequential(OrderedDict({"trunk": Trunk(row, beside, everything, mirror), **head}))


def _soft_block(inputs: int, outputs: int, kernel: int, power: float, pool: nn.Module) -> nn.Module:
    conv = _long(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=False))
    block = OrderedDict(norm=nn.BatchNorm2d(inputs, affine=False), conv=conv, active=Triangle(), pool=pool)
    if power != 1:
        block["power"] = Power(power)  # after a maximum, which it leaves the same: on a quarter of the values
    return nn.Sequential(block)


def _long(conv: nn.Conv2d) -> nn.Conv2d:
    """Weight vectors of length 25."""
    nn.init.normal_(conv.weight, std=25 / math.sqrt(conv.weight[0].numel()))
    return conv


class Grey(nn.Module):
    """Images back to grey levels from 0 to 1, by the least and the largest value seen in training."""

    def __init__(self) -> None:
        super().__init__()
        self.least: torch.Tensor
        self.largest: torch.Tensor
        self.register_buffer("least", torch.tensor(math.inf))
        self.register_buffer("largest", torch.tensor(-math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        if self.training:
            least, largest = torch.aminmax(x.detach())
            self.least.copy_(torch.minimum(self.least, least))
            self.largest.copy_(torch.maximum(self.largest, largest))
        return ((x - self.least) / (self.largest - self.least).clamp(min=1e-12)).clamp(0, 1)


class Tossed(nn.Module):
    """In training, each pixel is 1 with its grey level as the probability, else 0, anew each time; then as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        return torch.bernoulli(x) if self.training else x


def rbm(shape: Shape, classes: int, *, hidden: Sequence[int]) -> nn.Module:
    """Restricted Boltzmann machines, one above the other, on binary pixels, and a linear readout of the last.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        hidden: the hidden units of each machine.
    """
    sizes = [math.prod(shape), *hidden]
    machines = [RBM(visible, units) for visible, units in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), Grey(), Tossed(), *machines, nn.Linear(sizes[-1], classes))


class InContext(nn.Module):
    """A gate that sees the last channels of an image, one number each, while its pathways see the other channels.

    Args:
        gate: of pathways that take flat images.
        contexts: so many channels, each the same number everywhere.
    """

    def __init__(self, gate: Gate, contexts: int) -> None:
        super().__init__()
        self.gate = gate
        self.contexts = contexts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×(C + contexts)×H×W to the gate's output."""
        image, context = x[:, : -self.contexts], x[:, -self.contexts :, 0, 0]
        y: torch.Tensor = self.gate(image.flatten(1).contiguous(), context)  # once, and not in each pathway
        return y

    def extra_repr(self) -> str:
        """Its option."""
        return f"contexts={self.contexts}"


def gated(
    shape: Shape, classes: int, *, pathways: int, hidden: int, active: int | None, contexts: int = 0
) -> nn.Module:
    """Linear pathways with ReLU, of which a gate opens a few for each image, and a linear readout.

    What the readout hears is normalised, however many pathways speak.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        pathways: to choose among.
        hidden: neurons of each.
        active: pathways that an image takes; ``None``: all.
        contexts: so many last channels of the image are a context, each the same number everywhere (one-hot: which
            task it is, say); the gate's controller sees them alone, and the pathways do not. 0: it sees the image.
    """
    channels, height, wide = shape
    if not 0 <= contexts < channels:
        raise ValueError(
            f"model.contexts={contexts} must be from 0 to {channels - 1}: of {channels} channels one at least is image"
        )
    inputs = (channels - contexts) * height * wide
    gate = Gate(
        nn.Linear(contexts or inputs, pathways),
        [nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True)) for _ in range(pathways)],
        active=active,
    )
    routed = [InContext(gate, contexts)] if contexts else [nn.Flatten(), gate]
    return nn.Sequential(*routed, nn.BatchNorm1d(hidden, affine=False), nn.Linear(hidden, classes))


class Patches(nn.Module):
    """An image as its patches, side by side: N×C×H×W to N × patches × pixels of one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W, whose sides ``size`` divides."""
        return F.unfold(x, self.size, stride=self.size).transpose(1, 2)

    def extra_repr(self) -> str:
        """Its option."""
        return f"size={self.size}"


class Places(nn.Module):
    """Adds to each position where it is: sines and cosines of many wavelengths (Vaswani et al., 2017)."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.code: torch.Tensor
        place, wave = torch.arange(count).unsqueeze(1), torch.arange(0, size, 2)
        angle = place * torch.exp(-wave * (math.log(10_000) / size))
        self.register_buffer("code", torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :size])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """N × positions × size, the same."""
        return x + self.code


class Residual(nn.Sequential):
    """A block that adds to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        y = x
        for module in self:
            y = module(y)
        return x + y


def attention(shape: Shape, classes: int, *, patch: int, size: int, heads: int, hidden: int, blocks: int) -> nn.Module:
    """Attention among the patches of an image, and a linear readout of them all.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        patch: pixels of a patch's side, which divides height and width.
        size: neurons of each patch.
        heads: of attention, which divide ``size``.
        hidden: neurons of the layer, with ReLU, that follows attention at each patch.
        blocks: of attention and that layer, one above the other.
    """
    channels, height, wide = shape
    if height % patch or wide % patch:
        raise ValueError(f"model.patch={patch} must divide the image, of {height}×{wide} pixels")

    count = (height // patch) * (wide // patch)

    def norm() -> nn.Module:
        return nn.LayerNorm(size, elementwise_affine=False)

    layers: list[nn.Module] = [
        Patches(patch),
        nn.Linear(channels * patch**2, size),
        Places(count, size),
    ]
    for _ in range(blocks):
        layers.append(Residual(norm(), Attention(size, heads)))
        layers.append(Residual(norm(), nn.Linear(size, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, size)))
    return nn.Sequential(*layers, norm(), nn.Flatten(), nn.Linear(count * size, classes))


def random_trunk(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The control: freeze everything but the last synapse at its random start, and train that one by SGD.

    A synaptic rule with ``readout="delta"`` trains its readout in the very same way, so that what it gains over this
    is what its trunk has learned.
    """
    readout = find_synapses(model)[-1]
    model.requires_grad_(False)
    readout.layer.requires_grad_(True)
    return torch.optim.SGD(readout.layer.parameters(), lr=lr, **options)
