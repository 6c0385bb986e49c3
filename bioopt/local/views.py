"""Other views of inputs: what changes about them without changing what they show."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 1 / 8  # of the size of an image, to each side
GAIN = 0.4  # of contrast; of brightness, in units of the deviation
HIDDEN = 0.5  # the length of the hidden part, of the size of an image
MASKED = 0.3  # of the values of a vector


def view_of(x: Tensor, channel_dim: int, generator: torch.Generator) -> Tensor:
    """Inputs, each changed at random: images and sequences shifted, of other contrast, partly hidden; vectors masked.

    Args:
        x: inputs of a layer, samples first.
        channel_dim: the dimension of channels, counted from the end; -1: vectors.
        generator: of the changes.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (len(x), 1), generator=generator, device=x.device)

    ones = [1] * (x.ndim - 1)
    mean = x.flatten(1).mean(1).view(-1, *ones)
    if channel_dim == -1:
        return torch.where(uniform(*x.shape) >= MASKED, x, mean)
    deviation = x.flatten(1).std(1, correction=0).view(-1, *ones)
    of_channels = [x.shape[d] if d == x.ndim + channel_dim else 1 for d in range(1, x.ndim)]
    gain = 1 + GAIN * (2 * uniform(len(x), *ones) - 1)
    brightness = GAIN * (2 * uniform(len(x), *of_channels) - 1) * deviation
    view = mean + (x - mean) * gain + brightness
    hidden = torch.ones((), dtype=torch.bool, device=x.device)
    for d in range(x.ndim + channel_dim + 1, x.ndim):
        size, at = x.shape[d], torch.arange(x.shape[d], device=x.device)
        shape = [len(x), *ones]
        shape[d] = size
        shift = round(size * SHIFT)
        index = (at + integers(-shift, shift)).clamp(0, size - 1).view(shape)
        view = view.gather(d, index.expand(x.shape))
        length = round(size * HIDDEN)
        first = integers(0, size - length)
        hidden = hidden & ((at >= first) & (at < first + length)).view(shape)
    return torch.where(hidden, mean, view).to(x.dtype)
