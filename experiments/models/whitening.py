"""ZCA whitening of images, learned from their patches."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Whiten(nn.Module):
    """ZCA whitening of images: subtracts from each pixel what its neighbourhood predicts of it.

    The filter comes from the covariance of the first ``patches`` patches seen in training (Bell & Sejnowski, 1997,
    *The "independent components" of natural scenes are edge filters*); neither labels nor gradients are used.
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
            with torch.autocast(x.device.type, enabled=False):  # sums over all patches overflow half precision
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
        """The rows of a matrix from patches to patches that make the pixel in the centre."""
        size, centre = self.size, self.size // 2
        return matrix.view(-1, size, size, len(matrix) // size**2, size, size)[:, centre, centre]

    def extra_repr(self) -> str:
        """Its options."""
        return f"size={self.size}, floor={self.floor}, patches={self.patches}"
