"""The local product ``Σ s xᵀ`` of a teaching signal and presynaptic activity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recorder import Firing
from .synapse import BUILT_IN, Synapse, padded, positions_of

HALF_CHUNK = 2**25  # values of patches of a convolution at a time, in half precision


class SparseSignal(NamedTuple):
    """A teaching signal that is zero for all but a few neurons of each event.

    Events are samples and positions, in the order of activity with its neurons moved to the last dimension.
    """

    neurons: Tensor  #: indices of the neurons that learn, without duplicates, events × neurons per event
    values: Tensor  #: their signal, of the same shape

    def dense(self, u: Tensor, channel: int) -> Tensor:
        """The signal of ``u``'s shape."""
        shape = u.movedim(channel, -1).shape
        zeros = self.values.new_zeros(len(self.values), shape[-1])
        return zeros.scatter_(1, self.neurons, self.values).view(shape).movedim(-1, channel)

    def total(self, size: int) -> Tensor:
        """The sum over events for each of ``size`` neurons."""
        return self.values.new_zeros(size).index_add_(0, self.neurons.flatten(), self.values.flatten())


@dataclass(eq=False)
class Events:
    """The activity of a few events, from which an update may take less work than from their local product.

    Attributes:
        synapse: the layer.
        x: presynaptic activity, events × inputs in the order of `rows_of`.
        s: the teaching signal, events × neurons.
        u: postsynaptic activity, events × neurons.
        most: the number of events that take no more work than their product.
    """

    synapse: Synapse
    x: Tensor
    s: Tensor
    u: Tensor
    most: int

    def product(self) -> Tensor:
        """``Σ s xᵀ``, of the weight's shape."""
        with torch.autocast(self.x.device.type, enabled=False):
            rows = in_full(self.s).T @ in_full(self.x)
        return weight_shaped(rows.to(self.synapse.weight.dtype), self.synapse)

    def joined(self, other: Events) -> Events | None:
        """All events of both; ``None`` if these are too many."""
        if len(self.x) + len(other.x) > self.most:
            return None
        x, s, u = (torch.cat(pair) for pair in ((self.x, other.x), (self.s, other.s), (self.u, other.u)))
        return replace(self, x=x, s=s, u=u)


def few_events(firing: Firing, u: Tensor, s: Tensor | SparseSignal, most: int) -> Events | None:
    """The events of a firing; ``None`` if they are too many, or the layer is neither Linear nor a plain convolution."""
    synapse, plain = firing.synapse, _is_plain_convolution(firing, u)
    if not 0 < u.numel() // len(synapse.weight) <= most or not (plain or type(synapse.layer) is nn.Linear):
        return None
    channel = u.ndim + synapse.channel_dim
    s = s.dense(u, channel) if isinstance(s, SparseSignal) else s
    of_signal, of_neurons = (v.movedim(channel, -1).reshape(-1, len(synapse.weight)) for v in (s, u.detach()))
    if plain:
        x = _patches(firing, 0, len(u), [d - 1 for d in _memory_order(synapse)[1:]], u.dtype)
    else:
        x = firing.x.detach().reshape(-1, synapse.weight.shape[1]).clone()
    # Activity may be changed in place after the layer, as by ReLU(inplace=True).
    return Events(synapse, x, of_signal.clone(), of_neurons.clone(), most)


def some_events(synapse: Synapse, x: Tensor, most: Callable[[int], int]) -> Tensor | None:
    """Presynaptic activity of evenly spaced events, pools × events × inputs, in the order of ``weight.flatten(1)``.

    Args:
        synapse: the layer.
        x: its input.
        most: for the number of events, about how many are wanted at most.

    Returns:
        ``None`` for layers that are neither Linear nor convolutions.
    """
    layer: Any = synapse.layer
    if type(layer) not in BUILT_IN:
        return None
    if type(layer) is nn.Linear:
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: max(1, math.ceil(len(rows) / most(len(rows))))].unsqueeze(0)
    x = x if x.ndim == layer.weight.ndim else x.unsqueeze(0)
    positions = positions_of(layer, x.shape[2:])
    wanted = most(len(x) * math.prod(positions))
    x = x[:: max(1, math.ceil(len(x) * min(8, math.prod(positions)) / wanted))]  # several positions of each sample
    spacing = max(1, math.ceil((len(x) * math.prod(positions) / wanted) ** (1 / len(positions))))
    chosen = [slice((min(spacing, count) - 1) // 2, None, min(spacing, count)) for count in positions]
    x = _windows(layer, padded(layer, x), 2)[(slice(None), slice(None), *chosen)]
    spatial = len(positions)
    x = x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    return x.reshape(-1, synapse.pools, synapse.weight[0].numel()).movedim(1, 0)


def in_full(values: Tensor) -> Tensor:
    """In single precision at least: half is too coarse for sums over many neurons, and squares overflow it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def power_of(values: Tensor) -> Tensor:
    """The mean square, in units of which changes of an activity are measured; 1 if that is 0, or of no values."""
    power = values.square().mean() if values.numel() else values.new_zeros(())
    return torch.where(power > 0, power, torch.ones_like(power))


def along_channels(values: Tensor, synapse: Synapse) -> Tensor:
    """One value per neuron, shaped to multiply postsynaptic activity."""
    return values.view(-1, *[1] * (-synapse.channel_dim - 1))


def over_events(values: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over samples and positions for each neuron."""
    events = [d for d in range(values.ndim) if d != channel]
    return values.sum(events, dtype=dtype) if events else values.to(dtype or values.dtype)  # sum([]) is over all


def rows_of(tensor: Tensor, synapse: Synapse) -> Tensor:
    """A tensor of the weight's shape as neurons × inputs: a view, if it has the weight's memory format."""
    return tensor.permute(_memory_order(synapse)).flatten(1)


def weight_shaped(rows: Tensor, synapse: Synapse) -> Tensor:
    """The inverse of `rows_of`."""
    order, shape = _memory_order(synapse), synapse.weight.shape
    back = sorted(range(len(order)), key=order.__getitem__)
    return rows.reshape([shape[d] for d in order]).permute(back)


def _memory_order(synapse: Synapse) -> list[int]:
    weight = synapse.weight
    return [0, *sorted(range(1, weight.ndim), key=lambda d: (weight.stride(d), weight.size(d)), reverse=True)]


def in_pools(tensor: Tensor, synapse: Synapse) -> Tensor:
    """`rows_of` as pools × neurons × inputs, in single precision at least, which solvers require."""
    rows = rows_of(tensor, synapse)
    rows = rows.view(synapse.pools, -1, rows.shape[1])
    return in_full(rows)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices: singular vectors stay, singular values are 0.7 to 1.2.

    By Newton-Schulz iterations with the coefficients of Muon (Jordan et al., 2024); directions weaker than about a
    hundredth of the strongest stay weaker.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: Tensor = matrices if wide else matrices.mT
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)  # or the squares of small entries would vanish
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)
    with torch.autocast(x.device.type, enabled=False):  # a step may be made inside it
        for _ in range(steps):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def squares_over_events(values: Tensor, channel: int) -> Tensor:
    """The sum of squares over samples and positions for each neuron."""
    events = [d for d in range(values.ndim) if d != channel]
    if not events or values.dtype in (torch.float32, torch.float64):  # several times as fast as a norm on the CPU
        return over_events(values.square(), channel)
    squares: Tensor = torch.linalg.vector_norm(values, dim=events).square()
    return squares


def local_product(firing: Firing, u: Tensor, s: Tensor | SparseSignal) -> Tensor:
    """``Σ s xᵀ`` over samples and positions, of the weight's shape.

    In general by autograd inside the layer. On the CPU, convolutions of many inputs multiply patches instead, which
    takes half the time, or, if few neurons of an event learn, sum sparsely.
    """
    weight, plain = firing.synapse.weight, _is_plain_convolution(firing, u)  # the thresholds below were measured
    half = u.dtype == torch.bfloat16
    if isinstance(s, SparseSignal):
        if plain and not half and weight.shape[1] >= 32 and len(weight) >= 16 * s.neurons.shape[1]:
            return _sparse_product(firing, u, s)
        s = s.dense(u, u.ndim + firing.synapse.channel_dim)
    # For fewer, the copy of the patches costs more than it saves.
    if plain and weight[0].numel() >= (2048 if half else 512) and len(weight) >= 256:
        return _product_of_patches(firing, u, s)
    if type(firing.synapse.layer) is nn.Linear and u.dtype != torch.float16:  # as autograd, without its overhead
        rows = firing.x.detach().reshape(-1, weight.shape[1]).to(u.dtype)
        return (s.reshape(-1, len(weight)).to(u.dtype).T @ rows).to(weight.dtype)
    # A sum over the events of a large batch overflows float16, and a mean underflows.
    scale = (u.numel() / len(weight)) ** -0.5 if u.dtype == torch.float16 else 1.0
    (product,) = torch.autograd.grad(u, weight, (s if scale == 1.0 else s * scale).to(u.dtype))
    return product if scale == 1.0 else product.div_(scale)


def _is_plain_convolution(firing: Firing, u: Tensor) -> bool:
    """Whether ``u`` comes from an ungrouped 2-d convolution of a batch on the CPU, in its own or in half precision."""
    layer = firing.synapse.layer
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and u.device.type == "cpu"
        and u.ndim == 4
        and (u.dtype == torch.bfloat16 or u.dtype == firing.x.dtype in (torch.float32, torch.float64))
    )


def _product_of_patches(firing: Firing, u: Tensor, s: Tensor) -> Tensor:
    weight = firing.synapse.weight
    outputs, inputs, *kernel = weight.shape
    width, positions = weight[0].numel(), u[0, 0].numel()
    # As many samples at a time as fit into the cache with their patches, and little memory beside activity and weights.
    most = max(100_000, min(2_000_000, max(weight.numel(), u.numel()) // 4))
    if u.dtype == torch.bfloat16:  # whose product gains from many events, and the sum costs a pass over the weights
        most = max(HALF_CHUNK, 4 * weight.numel())
    step = max(1, most // (width * positions))
    total: Tensor | None = None
    for start in range(0, len(u), step):
        rows = _patches(firing, start, step, [1, 2, 0], u.dtype)
        signal = s[start : start + step].permute(0, 2, 3, 1).reshape(-1, outputs).to(rows.dtype)
        if u.dtype == torch.bfloat16:  # several sums are added in full precision
            part = (signal.T.contiguous() @ rows).to(weight.dtype)
            total = part if total is None else total.add_(part)
        else:
            total = signal.T @ rows if total is None else total.addmm_(signal.T, rows)
        del rows  # before the next ones are allocated
    assert total is not None
    return total.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def _windows(layer: Any, x: Tensor, first: int) -> Tensor:
    """The positions of a convolution along its spatial dimensions, and its kernel along new last ones: a view.

    Args:
        layer: the convolution.
        x: its padded input.
        first: the first spatial dimension of ``x``.
    """
    places = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(places, start=first):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def _patches(firing: Firing, start: int, count: int, order: list[int], dtype: torch.dtype) -> Tensor:
    """What each event of some samples sees, events × inputs; ``order``: of channels (0), rows (1) and columns (2)."""
    layer: Any = firing.synapse.layer
    patches = _windows(layer, _some_input(firing, start, count, dtype), 1)
    return patches.permute(0, 1, 2, *(3 + d for d in order)).reshape(-1, layer.weight[0].numel())


def _sparse_product(firing: Firing, u: Tensor, s: SparseSignal) -> Tensor:
    """For each neuron and each place in the kernel, an embedding bag sums the pixels of the events it learns from."""
    layer: Any = firing.synapse.layer
    weight = firing.synapse.weight
    outputs, inputs, *kernel = weight.shape
    positions, per_event = u[0, 0].numel(), s.neurons.shape[1]
    down, across = (torch.arange(n, device=u.device) * d for n, d in zip(u.shape[2:], layer.stride, strict=True))
    every = torch.arange(outputs, device=u.device)
    total = weight.new_empty(outputs, *kernel, inputs)
    # As many samples at a time as fit into the cache, or more if the weights are larger than that.
    step = 1 + max(500_000, weight.numel() // 2) // (inputs * positions)
    for start in range(0, len(u), step):
        x = _some_input(firing, start, step, u.dtype)
        pixels, (samples, height, width) = x.reshape(-1, inputs), x.shape[:3]
        corner = torch.arange(samples, device=x.device).view(-1, 1, 1) * height * width + down.view(-1, 1) * width
        corner = (corner + across).flatten()  # of each event's patch
        events = slice(start * positions, start * positions + len(corner))
        neuron, order = s.neurons[events].flatten().sort()
        signal = s.values[events].flatten()[order].to(x.dtype)
        seen, first = corner[order // per_event], torch.searchsorted(neuron, every)
        for i, j in itertools.product(*map(range, kernel)):
            pixel = seen + (i * layer.dilation[0] * width + j * layer.dilation[1])
            bags = F.embedding_bag(pixel, pixels, first, mode="sum", per_sample_weights=signal)
            if start:
                total[:, i, j] += bags
            else:
                total[:, i, j] = bags
    return total.permute(0, 3, 1, 2)


def _some_input(firing: Firing, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Some samples of a convolution's input, padded, channels last, in the precision of the layer."""
    x = firing.x.detach()[start : start + count].to(dtype)
    with torch.autocast(x.device.type, enabled=False):  # which pads in single precision
        return padded(firing.synapse.layer, x).permute(0, 2, 3, 1)
