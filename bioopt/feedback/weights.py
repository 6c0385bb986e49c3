"""Random feedback weights: drawn from a seed and the index of a layer, so that they are no state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.noise import NoiseSource, fill_normal_, mixed
from ..core.synapse import Synapse


class RandomWeights:
    """The random weights of layers, kept in memory until their device, type, shape or size changes."""

    def __init__(self) -> None:
        self._kept: dict[Synapse, tuple[tuple[Any, ...], Tensor]] = {}
        self._noise = NoiseSource()

    def fixed(self, synapse: Synapse, like: Tensor, shape: torch.Size, deviation: float, seed: int) -> Tensor:
        """Normal numbers that depend on the seed and the layer alone.

        Args:
            synapse: the layer.
            like: has the device, the type and, if its shape is this one, the memory format of the result.
            shape: of the result.
            deviation: standard deviation.
            seed: of the rule.
        """
        strides = like.stride() if like.shape == shape else None
        key = (like.device, like.dtype, shape, strides, deviation, seed)
        known, kept = self._kept.get(synapse, (None, None))
        if kept is None or known != key:
            kept = drawn(like, shape, deviation, seed, synapse.index)
            self._kept[synapse] = key, kept
        return kept

    def at_step(self, synapse: Synapse, like: Tensor, seed: int, step: int) -> Tensor:
        """Standard normal numbers, as ``like``, that depend on the seed, the layer and the step; not kept."""
        return fill_normal_(torch.empty_like(like), self._noise.stream(like.device, seed, synapse.index, step))


def drawn(like: Tensor, shape: torch.Size, deviation: float, *counts: int) -> Tensor:
    """Normal numbers that depend on the counts alone, of the device, type and memory format of ``like``.

    They are drawn on the CPU, in single precision and in the order of their indices: a run that is resumed on another
    device or in another memory format must keep its feedback.
    """
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    generator = torch.Generator().manual_seed(mixed(*counts))
    numbers = torch.randn(shape, generator=generator).mul_(deviation)
    numbers = numbers.to(device=like.device, dtype=like.dtype)
    return torch.empty_like(like).copy_(numbers) if like.shape == shape else numbers
