"""Units of perturbation: the neurons and positions whose noise is credited with a slope of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.products import in_full

__all__ = ["Found", "Scope", "Units", "in_positions", "scopes_of", "slopes_of", "unpooled"]


def in_positions(h: Tensor, channel_dim: int, neurons: int, positions: Sequence[int]) -> Tensor:
    """The activity at the end of a block, samples × neurons × positions.

    Args:
        h: as the next layer receives it.
        channel_dim: its dimension of the neurons, counted from the end.
        neurons: of the layer below.
        positions: of that layer's output, as many along each dimension. If ``h`` is flat, it is taken for an image of
            the same proportions, neuron after neuron, as `torch.nn.Flatten` leaves it.
    """
    if h.ndim != 2:
        h = h.movedim(channel_dim, 1)
        return h.flatten(4) if h.ndim > 5 else h
    features = h.shape[1]
    if not positions or features % neurons:
        return h
    shrunk = (math.prod(positions) * neurons / features) ** (1 / len(positions))
    sizes = [round(n / shrunk) for n in positions]
    return h.unflatten(1, (neurons, *sizes)) if math.prod(sizes) * neurons == features else h


def unpooled(weight: Tensor, positions: Sequence[int]) -> Tensor:
    """A weight of features that are averages over windows, as a weight of all positions.

    The windows are those of `torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        weight: outputs × neurons × windows along each dimension.
        positions: along each dimension.
    """
    for size in positions:
        windows, at = weight.shape[2], torch.arange(size, device=weight.device)
        edge = torch.arange(windows + 1, device=weight.device) * size
        first, last = edge[:-1] // windows, -(-edge[1:] // windows)
        inside = ((first.unsqueeze(1) <= at) & (at < last.unsqueeze(1))).to(weight.dtype)
        weight = torch.tensordot(weight, inside / inside.sum(1, keepdim=True), ([2], [0]))
    return weight


@dataclass(frozen=True)
class Units:
    """Groups of neurons, times patches of positions.

    Attributes:
        neurons: at the end of the block.
        groups: of neurons, all of one size.
        positions: at the end of the block, along each dimension.
        patches: of these, along each dimension.
    """

    neurons: int
    groups: int
    positions: tuple[int, ...]
    patches: tuple[int, ...]

    @classmethod
    def of(cls, h: Tensor, groups: int, patches: int | None) -> Units:
        """The units of activity, samples × neurons × positions.

        Args:
            h: the activity.
            groups: the most groups that there may be.
            patches: the most patches along each dimension; ``None``: each position is one.
        """
        _, neurons, *positions = h.shape
        groups = next(g for g in range(min(groups, neurons), 0, -1) if neurons % g == 0)
        return cls(neurons, groups, tuple(positions), tuple(min(patches or n, n) for n in positions))

    @property
    def single(self) -> bool:
        """Whether a sample is one unit."""
        return self.groups == 1 == math.prod(self.patches)

    def fit(self, u: Tensor) -> bool:
        """Whether a layer's activity, neurons in the second dimension, has these neurons, and positions alike."""
        return u.ndim == 2 + len(self.positions) and u.shape[1] == self.neurons

    def sums(self, values: Tensor) -> Tensor:
        """The sums over the neurons and positions of each unit, samples × groups × patches."""
        values = values.unflatten(1, (self.groups, -1)).sum(2)
        for d, (positions, patches) in enumerate(zip(self.positions, self.patches, strict=True), 2):
            if patches < positions:
                shape = (*values.shape[:d], patches, *values.shape[d + 1 :])
                values = values.new_zeros(shape).index_add_(d, _patch_of(positions, patches, values.device), values)
        return values

    def at_positions(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Values of units, samples × groups × patches, at each position of a layer that is spread over the patches."""
        for d, (size, positions, patches) in enumerate(zip(sizes, self.positions, self.patches, strict=True), 2):
            at = _patch_of(size, positions, values.device)
            values = values.index_select(d, _patch_of(positions, patches, values.device)[at])
        return values

    def every_other(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """A direction of a layer's activity, the same for all that belong to even units: a shift and a stretch.

        It needs no random numbers; `Scope.without_effect` does.
        """
        if not self.fit(u):
            return torch.zeros_like(u)
        odd = self.at_positions(self.odd(u.device), u.shape[2:]).repeat_interleave(self.neurons // self.groups, 1)
        return (1 - odd) * (1 + u / (u.square().mean().sqrt() + torch.finfo(u.dtype).tiny))

    def odd(self, device: torch.device) -> Tensor:
        """1 for every other unit, as the black fields of a chessboard; 1 × groups × patches."""
        total = torch.arange(self.groups, device=device)
        for size in self.patches:
            total = total.unsqueeze(-1) + torch.arange(size, device=device)
        return (total % 2).to(torch.float32).unsqueeze(0)


class Found(NamedTuple):
    """What a pass has found about a layer: units at the end of its block, whether it has them, its place among others.

    Attributes:
        units: at the end of its block.
        fits: whether its neurons and positions are those of the units.
        place: among the layers that end together.
    """

    units: Units
    fits: bool
    place: int


class Scope(NamedTuple):
    """Activities that are normalised together: those of one group of neurons.

    Attributes:
        samples: of all samples, or of one.
        groups: the number of groups.
        positions: at all positions, or at one.
    """

    samples: bool
    groups: int
    positions: bool

    def size(self, shape: Sequence[int]) -> int:
        """The number of activities, of samples × neurons × positions, that are normalised together."""
        samples, neurons, *positions = shape
        return (
            neurons // self.groups * (samples if self.samples else 1) * (math.prod(positions) if self.positions else 1)
        )

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the scope; values and result: samples × groups × neurons of a group × positions."""
        dims = [2, *([0] if self.samples else []), *(range(3, values.ndim) if self.positions else [])]
        return values.mean(dims, keepdim=True)

    def standardised(self, u: Tensor) -> Tensor:
        """Activity, samples × neurons × positions, with mean 0 and mean square 1, in groups."""
        u = in_full(u.unflatten(1, (self.groups, -1)))
        u = u - self.mean(u)
        return u / (self.mean(u.square()).sqrt() + torch.finfo(u.dtype).eps)

    def without_effect(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """A direction along which normalised activity does not change: a shift and a stretch of each scope."""
        u = self.standardised(u)
        shift, stretch = (torch.randn(self.mean(u).shape, generator=generator, device=u.device) for _ in range(2))
        return (shift + stretch * u).flatten(1, 2)

    def with_effect(self, signal: Tensor, u: Tensor) -> Tensor:
        """A teaching signal without its part along these directions, all samples × neurons × positions."""
        u, dtype = self.standardised(u), signal.dtype
        signal = in_full(signal.unflatten(1, (self.groups, -1)))
        signal = signal - self.mean(signal)
        return (signal - u * self.mean(signal * u)).flatten(1, 2).to(dtype)


def scopes_of(shape: Sequence[int], groups: Iterable[int]) -> list[Scope]:
    """Those that layers of normalisation may have, narrow ones first: what changes nothing there, does so in wide ones.

    Args:
        shape: of activity, samples × neurons × positions.
        groups: the numbers of groups that there may be, besides one, and one for each neuron.
    """
    neurons = shape[1]
    numbers = sorted({g for g in (1, *groups, neurons) if neurons % g == 0}, reverse=True)
    at_positions = [Scope(False, 1, False)] if len(shape) > 2 else []
    return [*at_positions, *(Scope(False, g, True) for g in numbers), Scope(True, neurons, True)]


def slopes_of(weight: Tensor, moved: Tensor, error: Tensor, groups: int) -> Tensor:
    """What the change of each group, at each position, contributes to the slope of its sample's loss.

    Args:
        weight: of the scores, classes × neurons × positions.
        moved: the derivative of the activity, samples × neurons × positions.
        error: of the scores, samples × classes.
        groups: of neurons.

    Returns:
        samples × groups × positions.
    """
    of_groups, by = moved.unflatten(1, (groups, -1)), weight.unflatten(1, (groups, -1))
    scores = torch.einsum("ngc...,kgc...->ngk...", of_groups, by)
    return torch.einsum("ngk...,nk->ng...", in_full(scores), error)


def _patch_of(positions: int, patches: int, device: torch.device) -> Tensor:
    return torch.arange(positions, device=device) * patches // positions
