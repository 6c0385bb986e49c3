"""A block: from the input of a layer to that of the next one, and what reverses it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..core.products import in_full, power_of
from .passes import Link, Pass

__all__ = ["Block"]


class Block:
    """The map from the input of a layer to that of the next one, at a forward pass.

    Args:
        link: the layer.
        above: the next one; ``None``: the layer is the last, and the block ends at its output.

    Attributes:
        bounds: the highest activity at the end of the block, and minus the lowest.
    """

    def __init__(self, link: Link, above: Link | None) -> None:
        self.link, self.above = link, above
        self._end = link.u if above is None else above.x
        self.h = in_full(self._end.detach())
        none = self.h.new_tensor(-torch.inf)
        self.bounds = (self.h.max(), -self.h.min()) if self.h.numel() else (none, none)

    @property
    def x(self) -> Tensor:
        """The activity at its input, without a graph."""
        return in_full(self.link.x.detach())

    @cached_property
    def scale_of_x(self) -> Tensor:
        """The root mean square of the activity at its input; 1 if there is none."""
        return power_of(self.x).sqrt()

    @cached_property
    def scale_of_h(self) -> Tensor:
        """The root mean square of the activity at its end; 1 if there is none."""
        return power_of(self.h).sqrt()

    def end_in(self, other: Pass) -> Tensor:
        """The activity at its end in another evaluation."""
        if self.above is None:
            return in_full(other.links[self.link.synapse].u.detach())
        return in_full(other.entered[self.above.synapse].detach())

    @cached_property
    def _limits(self) -> tuple[Tensor, Tensor]:
        """How far activity may move down and up. The extremes themselves may move on: they mark no end of a range."""
        highest, lowest = self.bounds[0], -self.bounds[1]
        down = torch.where(self.h == lowest, -torch.inf, lowest - self.h)
        up = torch.where(self.h == highest, torch.inf, highest - self.h)
        return down, up

    def limited(self, change: Tensor) -> Tensor:
        """A change at the end of the block that stays in the range of its activity; an output has no range."""
        return change if self.above is None else change.clamp(*self._limits)

    def reversed(self, change: Tensor) -> Tensor:
        """A change at the end of the block, carried back to the output of its layer by the transposed derivative."""
        if self.above is None:
            return change
        (back,) = torch.autograd.grad(self._end, self.link.leaf, change.to(self._end.dtype), retain_graph=True)
        return in_full(back.detach())

    def transposed(self, weight: Tensor, g: Tensor) -> Tensor:
        """A change at the output of the layer, carried to its input by other weights than its own."""
        return self.link.synapse.transpose(weight, g, self.link.x.shape)

    def product(self, x: Tensor, g: Tensor) -> Tensor:
        """``Σ g xᵀ`` over samples and positions, of the shape of the layer's weights; no weight is read."""
        weight, layer = self.link.synapse.weight, self.link.synapse.layer
        if type(layer) is nn.Linear:  # as autograd, without a forward pass
            return (g.reshape(-1, len(weight)).T @ x.reshape(-1, weight.shape[1])).to(weight.dtype)
        if type(layer) is nn.Conv2d and x.ndim == 4 and layer.padding_mode == "zeros" and type(layer.padding) is tuple:
            patches: Tensor = conv2d_weight(
                x, weight.shape, g, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            return patches.to(weight.dtype)
        with torch.enable_grad():
            u = layer.forward(x.to(weight.dtype))
            (product,) = torch.autograd.grad(u, weight, g.to(u.dtype))
        return product
