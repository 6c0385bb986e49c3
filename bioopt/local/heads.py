"""Heads of blocks: what a local loss computes from the activity at the end of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.readout import GradientReadoutOptions

__all__ = ["BlockOptions", "Heads", "LocalOptions", "cross_entropy", "deviation", "pooled", "require_size"]


class BlockOptions(GradientReadoutOptions, total=False):
    """Options of rules with local losses, besides their readout; `BlockRule` describes them."""

    head_lr: float | None
    blocks: Sequence[str | nn.Module] | None
    classes: int | None
    seed: int
    example: Any


class LocalOptions(BlockOptions, total=False):
    """The same, with their readout."""

    readout: str | None


class Heads(nn.ModuleDict):
    """Several heads of one block, each with an input of its own."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The output of each."""
        return [head(x) for head, x in zip(self.values(), inputs, strict=True)]


def pooled(h: Tensor, channel_dim: int, size: int) -> Tensor:
    """The features of each sample, averaged over positions until at most ``size`` are left along each dimension."""
    if h.ndim < 3:
        return h
    h = h.movedim(channel_dim, 1)
    if h.ndim > 5:
        h = h.flatten(4)
    sizes = [min(size, length) for length in h.shape[2:]]
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[h.ndim - 3]
    return h.flatten(1) if sizes == [*h.shape[2:]] else pool(h, sizes).flatten(1)


def deviation(h: Tensor) -> Tensor:
    """The deviation over positions of each feature (last dimension); the features themselves if there are none."""
    if h.ndim < 3:
        return h
    h = h.flatten(1, -2)
    variance = h.var(1, correction=0)
    return (variance + torch.finfo(h.dtype).eps).sqrt()  # a root of 0 has no finite slope


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, in single precision at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def require_size(rule: str, block: str, head: Any, features: Tensor) -> None:
    """Raise where the activity at the end of a block has another size than its head was made for."""
    if features.ndim < 2 or features.shape[-1] == 0:
        raise RuntimeError(
            f"{rule}: no head can be sized for block '{block}', at whose end the activity has the shape "
            f"{tuple(features.shape)}: its first dimension must be the samples, and there must be others"
        )
    if not is_lazy(head.weight) and head.weight.shape[1] != features.shape[-1]:
        raise RuntimeError(
            f"{rule}: the head of block '{block}' was made for {head.weight.shape[1]} features, but the activity at "
            f"the end of the block now has {features.shape[-1]}: give inputs of one size, and name coarser blocks by "
            "blocks= where a layer runs several times with activity of different sizes"
        )
