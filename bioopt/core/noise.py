"""Reproducible noise: a direction depends on a seed and some counts alone, not on earlier draws.

So a member of a population costs no memory (it is drawn again when needed), other processes can draw it too, and the
global random state is not touched. On one device the numbers repeat exactly; a CPU and a GPU draw different ones, as
with torch's own generators.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["NoiseSource", "fill_normal_", "fill_rademacher_"]

_MASK = 2**64 - 1
_CHUNK = 2**16  # numbers drawn at once, which stay in the cache of a core


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): spreads every bit of the input over the output."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mixed(seed: int, *counts: int) -> int:
    """One seed for the stream ``(seed, *counts)``."""
    key = _mix(seed)
    for count in counts:
        key = _mix(key + _mix(count + 1))  # + 1, or a count equal to the seed would cancel it
    return key >> 1


class NoiseSource:
    """One generator per device, set to a stream by ``(seed, *counts)``."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def stream(self, device: torch.device, seed: int, *counts: int) -> torch.Generator:
        """A generator at the start of the stream ``(seed, *counts)``; valid until the next call for the device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(mixed(seed, *counts))


def fill_normal_(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a tensor with standard normal numbers, in the order of its memory.

    Half precision has only some thousands of them. On a CPU they are looked up among 65,536 quantiles, four by one
    random number, which takes a third of the time of `torch.Tensor.normal_`.
    """
    fill = _fill_with_quantiles_ if tensor.device.type == "cpu" and tensor.dtype.itemsize == 2 else _fill_normal_
    ordered = _in_memory_order(tensor)
    if ordered.ndim == 1:
        fill(ordered, generator)
    else:  # torch draws other numbers where there are gaps
        dense = torch.empty(ordered.shape, dtype=tensor.dtype, device=tensor.device)
        fill(dense.view(-1), generator)
        ordered.copy_(dense)
    return tensor


def _fill_normal_(flat: Tensor, generator: torch.Generator) -> None:
    flat.normal_(generator=generator)


def _fill_with_quantiles_(flat: Tensor, generator: torch.Generator) -> None:
    quantiles = _normal_quantiles(flat.dtype)
    size = min(flat.numel(), _CHUNK)
    numbers = torch.empty(size // 4 + 1, dtype=torch.int64)
    which = torch.empty(size, dtype=torch.int32)
    for part in flat.split(_CHUNK):
        numbers.random_(-(2**63), None, generator=generator)
        index = which[: len(part)].copy_(numbers.view(torch.uint16)[: len(part)])
        torch.index_select(quantiles, 0, index, out=part)


@functools.cache
def _normal_quantiles(dtype: torch.dtype) -> Tensor:
    """Equally probable numbers of a standard normal distribution, with mean 0 and variance 1."""
    levels = torch.arange(0.5, 2**16, dtype=torch.float64, device="cpu") / 2**16
    quantiles: Tensor = torch.special.ndtri(levels)
    return quantiles.div_(quantiles.square().mean().sqrt()).to(dtype)


def fill_rademacher_(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a tensor with -1 and 1 with equal probability, in the order of its memory.

    One random number gives eight of them, which is several times as fast as normal numbers.
    """
    numbers = torch.empty(tensor.numel() // 8 + 1, dtype=torch.int64, device=tensor.device)
    signs = numbers.random_(-(2**63), None, generator=generator).view(torch.int8)[: tensor.numel()]
    ordered = _in_memory_order(tensor)
    ordered.copy_(signs.bitwise_and_(2).sub_(1).view(ordered.shape))
    return tensor


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view in the order of memory: torch fills a channels-last tensor itself eight times as slowly.

    A tensor with gaps in its memory, such as a slice, keeps its dimensions, in the order of memory.
    """
    order = sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d), tensor.size(d)), reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else ordered
