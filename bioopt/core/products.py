"""The local product ``Σ s xᵀ`` of a teaching signal and presynaptic activity, and the signals it is made of."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recorder import Firing
from .synapse import padded


class SparseSignal(NamedTuple):
    """A teaching signal for a few neurons of each event, which saves the zeros for all the others.

    Events are samples and positions, in the order of activity with its neurons moved to the last dimension.
    """

    neurons: Tensor  #: the neurons that learn, each once, events × neurons of an event
    values: Tensor  #: their signal, of the same shape

    def dense(self, u: Tensor, channel: int) -> Tensor:
        """The same signal of ``u``'s shape."""
        shape = u.movedim(channel, -1).shape
        zeros = self.values.new_zeros(len(self.values), shape[-1])
        return zeros.scatter_(1, self.neurons, self.values).view(shape).movedim(-1, channel)

    def total(self, size: int) -> Tensor:
        """The sum over events for each of ``size`` neurons."""
        return self.values.new_zeros(size).index_add_(0, self.neurons.flatten(), self.values.flatten())


def in_full(values: Tensor) -> Tensor:
    """At least in single precision: half is too coarse for sums over many neurons, and too narrow for squares."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def over_events(values: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over samples and positions for each neuron."""
    events = [d for d in range(values.ndim) if d != channel]
    return values.sum(events, dtype=dtype) if events else values.to(dtype or values.dtype)  # sum([]) is over all


def local_product(firing: Firing, u: Tensor, s: Tensor | SparseSignal) -> Tensor:
    """``Σ s xᵀ`` over samples and positions, of the weight's shape.

    Autograd inside the one layer that made ``u``: right for every kind of layer. On the CPU, convolutions of many
    inputs take the same product over their patches instead, half the time of the library's own; where few neurons of
    an event learn, it is a sparse product.
    """
    weight, plain = firing.synapse.weight, _is_plain_convolution(firing, u)  # the sizes below are measured
    if isinstance(s, SparseSignal):
        if plain and weight.shape[1] >= 32 and len(weight) >= 16 * s.neurons.shape[1]:
            return _product_of_few(firing, u, s)
        s = s.dense(u, u.ndim + firing.synapse.channel_dim)
    if plain and weight[0].numel() >= 512 and len(weight) >= 256:  # fewer do not repay the copy of the patches
        return _product_of_patches(firing, u, s)
    # A sum over the events of a large batch is too much for float16, and the entries of a mean are too small.
    scale = (u.numel() / len(weight)) ** -0.5 if u.dtype == torch.float16 else 1.0
    (product,) = torch.autograd.grad(u, weight, (s if scale == 1.0 else s * scale).to(u.dtype))
    return product if scale == 1.0 else product.div_(scale)


def _is_plain_convolution(firing: Firing, u: Tensor) -> bool:
    """Whether ``u`` was made by a convolution on the CPU, of a batch, in the precision of its input."""
    layer, x = firing.synapse.layer, firing.x
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and u.device.type == "cpu"
        and u.ndim == 4
        and u.dtype in (torch.float32, torch.float64)
        and x.dtype == u.dtype
    )


def _product_of_patches(firing: Firing, u: Tensor, s: Tensor) -> Tensor:
    layer: Any = firing.synapse.layer
    weight = firing.synapse.weight
    outputs, inputs, *kernel = weight.shape
    width, positions = weight[0].numel(), u[0, 0].numel()
    # As many samples at a time as fit into the cache with their patches, and are small beside activity or weights.
    step = max(1, max(100_000, min(2_000_000, max(weight.numel(), u.numel()) // 4)) // (width * positions))
    total: Tensor | None = None
    for start in range(0, len(u), step):
        patches = _some_input(firing, start, step)
        for dim, (size, stride, dilation) in enumerate(zip(kernel, layer.stride, layer.dilation, strict=True), start=1):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, width)
        signal = s[start : start + step].permute(0, 2, 3, 1).reshape(-1, outputs).to(rows.dtype)
        total = signal.T @ rows if total is None else total.addmm_(signal.T, rows)
        del patches, rows  # before the next
    assert total is not None
    return total.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def _product_of_few(firing: Firing, u: Tensor, s: SparseSignal) -> Tensor:
    """Each neuron has a bag of the events that it learns: for each place in the kernel, the sum of the pixels there."""
    layer: Any = firing.synapse.layer
    weight = firing.synapse.weight
    outputs, inputs, *kernel = weight.shape
    positions, few = u[0, 0].numel(), s.neurons.shape[1]
    down, across = (torch.arange(n, device=u.device) * d for n, d in zip(u.shape[2:], layer.stride, strict=True))
    every = torch.arange(outputs, device=u.device)
    total = weight.new_empty(outputs, *kernel, inputs)
    # As many samples at a time as fit into the cache, unless that is little beside what they add up to.
    step = 1 + max(500_000, weight.numel() // 2) // (inputs * positions)
    for start in range(0, len(u), step):
        x = _some_input(firing, start, step)
        pixels, (samples, height, width) = x.reshape(-1, inputs), x.shape[:3]
        corner = torch.arange(samples, device=x.device).view(-1, 1, 1) * height * width + down.view(-1, 1) * width
        corner = (corner + across).flatten()  # of each event's patch
        events = slice(start * positions, start * positions + len(corner))
        neuron, order = s.neurons[events].flatten().sort()
        signal = s.values[events].flatten()[order].to(x.dtype)
        seen, first = corner[order // few], torch.searchsorted(neuron, every)
        for i, j in itertools.product(*map(range, kernel)):
            pixel = seen + (i * layer.dilation[0] * width + j * layer.dilation[1])
            bags = F.embedding_bag(pixel, pixels, first, mode="sum", per_sample_weights=signal)
            if start:
                total[:, i, j] += bags
            else:
                total[:, i, j] = bags
    return total.permute(0, 3, 1, 2)


def _some_input(firing: Firing, start: int, count: int) -> Tensor:
    """Some samples of what entered a convolution, padded, channels last."""
    return padded(firing.synapse.layer, firing.x.detach()[start : start + count]).permute(0, 2, 3, 1)
