"""Patches of images, normalised in contrast and whitened together."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class WhitenedPatches(nn.Module):
    """The patches of an image, each without its mean, divided by its contrast, and whitened by ZCA.

    A patch p of C·k² pixels becomes Z·(p − mean p) / √(var p + contrast²). The retina and the visual cortex do the
    same by lateral inhibition and divisive normalisation; it leaves edges and colours, all equally strong.
    Z = (covariance + floor)^(−½) comes from the first ``patches`` patches seen in training; neither labels nor
    gradients are used (Coates, Ng & Lee, 2011, *An analysis of single-layer networks in unsupervised feature
    learning*; ZCA: Bell & Sejnowski, 1997).

    Args:
        channels: C of an image.
        size: k, of a side of a patch.
        contrast: the deviation within a patch below which it counts as empty, in units of the image's deviation.
        floor: of the variances, in units of those of normalised pixels: weaker directions are left weak.
        patches: how many are seen before the filter stands still.
    """

    def __init__(
        self, channels: int, size: int = 6, contrast: float = 0.16, floor: float = 0.1, patches: int = 200_000
    ) -> None:
        super().__init__()
        self.size, self.contrast, self.floor, self.patches = size, contrast, floor, patches
        self.pixels = channels * size**2
        self.seen: torch.Tensor
        self.covariance: torch.Tensor
        self.filter: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("covariance", torch.zeros(self.pixels, self.pixels))
        self.register_buffer("filter", torch.eye(self.pixels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×C×H×W to patches N×C·k²×(H − k + 1)×(W − k + 1)."""
        patches = F.unfold(x, self.size)
        patches = (patches - patches.mean(1, keepdim=True)) * self.gain(x).unsqueeze(1)
        if self.training and self.seen < self.patches:
            self._learn(patches.detach())
        white = torch.matmul(self.filter, patches)
        return white.view(*white.shape[:2], x.shape[2] - self.size + 1, x.shape[3] - self.size + 1)

    def gain(self, x: torch.Tensor) -> torch.Tensor:
        """1 / √(var p + contrast²) of each patch of images N×C×H×W, as N×P."""
        mean, square = (F.avg_pool2d(t.mean(1, keepdim=True), self.size, 1) for t in (x, x * x))
        variance = (square - mean * mean).clamp(min=0)
        return (variance + self.contrast**2).rsqrt().flatten(1)

    @torch.no_grad()
    def _learn(self, patches: torch.Tensor) -> None:
        with torch.autocast(patches.device.type, enabled=False):  # sums over all patches overflow half precision
            few = patches[:, :, ::7].transpose(1, 2).flatten(0, 1).to(self.covariance.dtype)  # neighbours are alike
            new = few.T @ few, torch.tensor(len(few), device=few.device)
            if dist.is_initialized():
                for sum_over_ranks in new:
                    dist.all_reduce(sum_over_ranks)
            self.covariance += new[0]
            self.seen += new[1]
            values, vectors = torch.linalg.eigh(self.covariance / self.seen)
            self.filter.copy_((vectors * (values.clamp(min=0) + self.floor).rsqrt()) @ vectors.T)

    def extra_repr(self) -> str:
        """Its options."""
        return f"size={self.size}, contrast={self.contrast}, floor={self.floor}, patches={self.patches}"
