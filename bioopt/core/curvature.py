r"""The curvature of a loss, as a layer that learns from it can measure it.

The second derivative of cross-entropy by an output is 1/2 at most, that of the squared error is 2, that of a weighted
loss anything; with a step that suits one of them another diverges. For a layer :math:`u = v x`, with the running mean
:math:`\bar v` of its weights, it is estimated by

.. math::
    h = \frac{\langle \nabla v \cdot (v - \bar v) \rangle}{\langle \lVert (v - \bar v)\, x \rVert^2 \rangle} .

Where weights swing about the best ones, as they do before they diverge, this is the curvature; while they approach
them, it is less, or negative, and a step need not be shorter. The gradient is that of a batch from which :math:`v` has
not learned, so that the noise of batches averages out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .homeostasis import Level
from .recorder import Firing
from .synapse import Synapse

__all__ = ["excess", "followed", "moved"]

OF_CROSS_ENTROPY = 0.5


def moved(firing: Firing, level: Level | None) -> Tensor:
    """The sum over events of how far their activity is, squared, from that by the mean weights."""
    x, apart = firing.x.detach(), _apart(firing.synapse, level)
    if not apart:
        return x.new_zeros((), dtype=torch.float32)
    return F.linear(x, **{name: change.to(x) for name, change in apart.items()}).float().square().sum()


def followed(
    level: Level | None, moved: Tensor, synapse: Synapse, grads: Mapping[Tensor, Tensor], r: float, first: float
) -> Level:
    """The part of a layer's level that is of curvature, after a step.

    Args:
        level: before it.
        moved: the mean over events of `moved`.
        synapse: the layer.
        grads: of its parameters, by the loss.
        r: the share of this step in mean weights.
        first: its share in what is only known from the second step on.
    """
    own = _followed_in(synapse)
    if level is None or "moved" not in level:
        return {**{name: p.detach().clone() for name, p in own.items()}, "moved": moved, "response": moved * 0}
    response = torch.zeros_like(moved)
    for name, change in _apart(synapse, level).items():
        if own[name] in grads:
            response = response + (grads[own[name]] * change).sum().to(moved)
    return {
        **{name: torch.lerp(level[name].to(p), p.detach(), r) for name, p in own.items()},
        "moved": torch.lerp(level["moved"].to(moved), moved, first),
        "response": torch.lerp(level["response"].to(moved), response, first),
    }


def excess(level: Level) -> Tensor:
    """How many times larger the curvature of the loss is than that of cross-entropy; 1 where it is not."""
    h: Tensor = level["response"] / level["moved"].clamp(min=torch.finfo(torch.float32).tiny)
    return (h / OF_CROSS_ENTROPY).clamp(min=1)


def _followed_in(synapse: Synapse) -> dict[str, Tensor]:
    """The parameters of a layer whose curvature is measured, as arguments of `torch.nn.functional.linear`."""
    if type(synapse.layer) is not nn.Linear:
        return {}
    return {name: p for name, p in (("weight", synapse.weight), ("bias", synapse.bias)) if p is not None}


def _apart(synapse: Synapse, level: Level | None) -> dict[str, Tensor]:
    """How far these parameters are from their running means; none before these are known."""
    if level is None or "moved" not in level:
        return {}
    return {name: p.detach() - level[name].to(p) for name, p in _followed_in(synapse).items()}
