"""Means of losses, and the backward pass of closures that leave it to the rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_over_samples(losses: Tensor) -> Tensor:
    """The loss of each sample: the mean over all dimensions but the first."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def mean_loss(losses: Tensor) -> Tensor:
    """The mean loss of each evaluation (first dimension), summed in double precision; 0 of no samples."""
    losses = losses.double()
    if losses.ndim == 1:
        return losses
    flat = losses.flatten(1)
    return flat.mean(1) if flat.shape[1] else flat.sum(1)


def loss_of(losses: Tensor) -> Tensor:
    """The mean loss of one evaluation; 0 of no samples."""
    return losses.mean() if losses.numel() else losses.sum()


def backward_where_missing(
    losses: Tensor, params: Sequence[Tensor], anchors: Sequence[Tensor] = (), *, retain_graph: bool = False
) -> None:
    """Send the mean loss backward to these parameters, unless the closure has done so.

    Args:
        losses: whose mean is sent.
        params: that it may reach.
        anchors: of the rules whose firings the backward pass must reach.
        retain_graph: whether the graph is needed again.
    """
    if losses.requires_grad and all(p.grad is None for p in params):
        # If the closure's own backward pass freed the graph, then a parameter has a gradient.
        inputs = [*(p for p in params if p.requires_grad), *anchors]
        if not inputs:  # all are frozen
            return
        with torch.enable_grad():
            torch.autograd.backward(losses.mean(), inputs=inputs, retain_graph=retain_graph)
