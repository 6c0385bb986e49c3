"""Other views of inputs: what changes about them without changing what they show."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 1 / 8  # of the size of an image, to each side
GAIN = 0.4  # of contrast, and in units of the deviation, of brightness
HIDDEN = 0.5  # the length of the hidden part, of the size of an image
MASKED = 0.3  # of the values of a vector


def view_of(x: Tensor, channel_dim: int, generator: torch.Generator) -> Tensor:
    """Inputs, each changed at random: images and sequences shifted, of other contrast and partly hidden; vectors masked.

    Args:
        x: inputs of a layer, samples first.
        channel_dim: the dimension of channels, counted from the end.
        generator: of the changes.
    """
    if channel_dim == -1:
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= MASKED
        return torch.where(kept, x, x.mean(-1, keepdim=True))
    n, like = len(x), {"generator": generator, "device": x.device}
    apart = (n, *[1] * (x.ndim - 1))
    mean = x.flatten(1).mean(1).view(apart)
    hidden = torch.ones((), dtype=torch.bool, device=x.device)
    for d in range(x.ndim + channel_dim + 1, x.ndim):
        size = x.shape[d]
        at = torch.arange(size, device=x.device)
        most = round(size * SHIFT)
        shift = torch.randint(-most, most + 1, (n, 1), **like)
        index = (at + shift).clamp(0, size - 1).view(n, *[size if e == d else 1 for e in range(1, x.ndim)])
        x = x.gather(d, index.expand(x.shape))
        first = torch.randint(round(size * (1 - HIDDEN)) + 1, (n, 1), **like)
        inside = (at >= first) & (at < first + round(size * HIDDEN))
        hidden = hidden & inside.view(index.shape)
    gain = 1 + GAIN * (2 * torch.rand(apart, **like) - 1)
    channels = [x.shape[d] if d == x.ndim + channel_dim else 1 for d in range(1, x.ndim)]
    offset = GAIN * (2 * torch.rand((n, *channels), **like) - 1)
    deviation = x.flatten(1).std(1).view(apart)
    x = mean + (x - mean) * gain + offset * deviation
    return torch.where(hidden, mean, x).to(x.dtype)
