"""Losses as closures return them: means, and the backward pass that a closure may have left to the rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_over_samples(losses: Tensor) -> Tensor:
    """The loss of each sample: the mean over all dimensions but the first."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def mean_loss(losses: Tensor) -> Tensor:
    """The mean loss of each evaluation (first dimension), summed in double precision."""
    return losses.double().flatten(1).mean(1) if losses.ndim > 1 else losses.double()


def backward_where_missing(losses: Tensor, params: Sequence[Tensor], anchors: Sequence[Tensor] = ()) -> None:
    """Send the mean loss backward, if the closure has not done so itself, to these parameters and to the cuts above.

    ``anchors``: of the rules whose firings count.
    """
    if losses.requires_grad and all(p.grad is None for p in params):
        # No graph leads there when the closure's own backward freed it; then a gradient has arrived.
        with torch.enable_grad():
            torch.autograd.backward(losses.mean(), inputs=[*(p for p in params if p.requires_grad), *anchors])
