"""Shared arithmetic of Hebbian rules: competition within pools, and Oja's decay."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.kernels import Kernel
from ..core.products import Events, SparseSignal, in_full
from ..core.synapse import Synapse

BLOCK = 128  # neurons at a time, in triangular systems


def compete(u: Tensor, synapse: Synapse, outcome: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``outcome(pooled, dim)``, of ``u``'s shape, where ``pooled`` has the neurons of one pool along ``dim``.

    In single precision at least.
    """
    channel = u.ndim + synapse.channel_dim
    u = in_full(u)
    last = u.movedim(channel, -1)
    if last.is_contiguous():  # as in a channels-last network: twice as fast as along dimension 1
        pooled = last.view(*last.shape[:-1], synapse.pools, -1)
        return outcome(pooled, pooled.ndim - 1).view_as(last).movedim(-1, channel)
    pooled = u.reshape(*u.shape[:channel], synapse.pools, -1, *u.shape[channel + 1 :])
    return outcome(pooled, channel + 1).flatten(channel, channel + 1)


def strongest(u: Tensor, synapse: Synapse, k: int) -> tuple[Tensor, Tensor]:
    """The activity of the ``k`` strongest neurons of each pool, events × pools × k, and their indices in the pool."""
    last = in_full(u.movedim(u.ndim + synapse.channel_dim, -1))
    activity, which = last.reshape(-1, synapse.pools, last.shape[-1] // synapse.pools).topk(k, -1)
    return activity, which


def sparse_signal(which: Tensor, values: Tensor, synapse: Synapse) -> SparseSignal:
    """A sparse signal from indices in each pool and values, both events × pools × neurons."""
    if synapse.pools > 1:
        size = len(synapse.weight) // synapse.pools
        which = which + torch.arange(synapse.pools, device=which.device).view(-1, 1) * size
    return SparseSignal(which.flatten(1), values.flatten(1))


def softmax_(strength: Tensor, dim: int, loser_strength: float = 0.0) -> Tensor:
    """The softmax along a dimension, in place, because these are the largest tensors of a step.

    With ``loser_strength``, all shares but the largest are multiplied by minus that.

    Shares are at least exp(-80), which is negligible: denormal numbers (below exp(-87) in single precision) take
    processors some twenty times as long.
    """
    if not loser_strength:
        strength.sub_(strength.amax(dim, keepdim=True)).clamp_(min=-80).exp_()
        return strength.mul_(strength.sum(dim, keepdim=True).reciprocal_())
    if strength.device.type == "cpu":
        strength.sub_(strength.amax(dim, keepdim=True))
        lost = _losers(strength, dim)
    else:
        top, winner = strength.max(dim, keepdim=True)
        strength.sub_(top)
        lost = torch.ones_like(strength).scatter_(dim, winner, 0)
    strength.clamp_(min=-80).exp_()
    strength.mul_(strength.sum(dim, keepdim=True).reciprocal_())
    return strength.addcmul_(strength, lost, value=-1 - loser_strength)


@Kernel
def shares(activity: Tensor, temperature: Tensor, loser_strength: Tensor, order: Tensor) -> Tensor:
    """`softmax_` of ``temperature * activity``, events × neurons, along the neurons and in the dtype of activity.

    ``order`` is ``n`` to 1 for ``n`` neurons: of those that lead together, the first wins. Computed in here, it would
    keep the compiler from fast code.
    """
    strength = activity.float() * temperature
    top = strength.amax(1, keepdim=True)
    first = torch.where(strength == top, order, 0.0).amax(1, keepdim=True)
    power = (strength - top).clamp(min=-80).exp()
    largest = power.sum(1, keepdim=True).reciprocal()
    return torch.where(order == first, largest, -loser_strength * power * largest).to(activity.dtype)


def shares_in_half(activity: Tensor, temperature: float, loser_strength: float) -> Tensor:
    """`shares` by eager operations: of some events at a time, whose values in single precision fit into the cache."""
    result = torch.empty_like(activity)
    count = max(1, 2**18 // activity.shape[1])
    for some, learned in zip(activity.split(count), result.split(count), strict=True):
        learned.copy_(softmax_(some.float().mul_(temperature), 1, loser_strength))
    return result


@Kernel
def of_largest_one(product: Tensor, weight: Tensor) -> Tensor:
    """``D / max|D| · √|‖w‖ - 1|`` with ``D = P - (P · w) w``, neurons × inputs, in the memory of ``P``."""
    change = product - (product * weight).sum(1, keepdim=True) * weight
    rate = ((weight * weight).sum(1, keepdim=True).sqrt() - 1).abs().sqrt()
    return product.copy_(change * (rate / change.abs().amax().clamp(min=1e-30)))


def _losers(behind: Tensor, dim: int) -> Tensor:
    """1 for all neurons but one that leads, 0 for that, by how far each is behind (0 for those that lead).

    On the CPU, ``argmax`` and comparisons take ten times as long as this arithmetic.
    """
    lost = (behind * -torch.finfo(behind.dtype).max).clamp_(max=1)
    several = lost.sum(dim) < behind.shape[dim] - 1
    if several.any():  # of those that are equal, the first wins
        equal = lost.movedim(dim, -1)
        equal[several] = torch.ones_like(equal[several]).scatter_(-1, equal[several].argmin(-1, keepdim=True), 0)
    return lost


def signal_activity_product(rows: Tensor, weight: Tensor, signal: Tensor | None, synapse: Synapse) -> Tensor:
    """``⟨s_k u_j⟩`` for the neurons k, j of each pool."""
    products = rows @ weight.mT
    if signal is not None and synapse.bias is not None:
        products += signal.view(*rows.shape[:2], 1) * synapse.bias.detach().view(rows.shape[0], 1, -1)
    return products


def decay_own_(rows: Tensor, weight: Tensor, signal: Tensor | None, synapse: Synapse, lr: float = 0.0) -> None:
    """Subtract ``⟨s_k u_k⟩ w_k`` of each neuron from its row, in place; with ``lr``, at the weights after the step."""
    of_bias = None if signal is None or synapse.bias is None else (signal * synapse.bias.detach()).unsqueeze(1)
    count = max(1, 2**17 // rows.shape[1])  # neurons at a time, which fit into the cache
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        row, w = rows[some], weight[some]
        power = torch.linalg.vecdot(row, w).unsqueeze(1)
        if of_bias is not None:
            power += of_bias[some]
        row.addcmul_(power, w, value=-1)
        if lr:
            row.div_(1 + lr * power)


def largest(change: Tensor) -> Tensor:
    """The largest absolute entry, in one pass over memory."""
    low, high = torch.aminmax(change)
    return torch.maximum(high, -low).clamp(min=1e-30)


def clip_update_norm(change: Tensor, weight: Tensor, lr: float) -> Tensor:
    """``change``, clipped in place in each pool so that the step is no longer than the pool's weights."""
    longest = torch.linalg.matrix_norm(weight, keepdim=True)
    length = lr * torch.linalg.matrix_norm(change, keepdim=True)
    return change.mul_((longest / length.clamp(min=1e-12)).clamp(max=1))


def most(neurons: int, pays: Callable[[int], bool]) -> int:
    """The largest number of events, fewer than ``neurons``, that pays, where all smaller numbers do too."""
    return bisect.bisect_left(range(1, neurons), True, key=lambda n: not pays(n))


def by_residual(events: Events, weight: Tensor, lr: float) -> Tensor:
    """``(I + lr C)⁻¹ (P - C W)``, with ``lr=0`` ``P - C W``, as ``Sᵀ (n I + lr U Sᵀ)⁻¹ (X - U W)``.

    The same by the push-through identity: a system of ``n`` events in place of one of neurons.
    """
    x, s, u = (in_full(values) for values in (events.x, events.s, events.u))
    residual = torch.addmm(x, u, weight, alpha=-1)
    if lr:
        system = (u @ s.T).mul_(lr)
        system.diagonal().add_(len(x))
        residual, _ = torch.linalg.solve_ex(system, residual)  # which does not wait for the device
    else:
        residual.div_(len(x))
    return s.T @ residual


def by_residuals_in_order(events: Events, weight: Tensor, lr: float, product: Tensor | None = None) -> Tensor:
    """``(I + lr L)⁻¹ (P - L W)`` with the lower triangle ``L`` of ``C``, block by block of neurons.

    Each block learns from what those before it leave of the input. ``product``, ``P``, need not be formed otherwise.
    """
    x, s, u = (in_full(values) for values in (events.x, events.s, events.u))
    n, residual = len(x), x.clone() if product is None else torch.zeros_like(x)
    change = torch.empty_like(weight)
    for start in range(0, len(weight), BLOCK):
        block = slice(start, start + BLOCK)
        w, lower = weight[block], (s[:, block].T @ u[:, block]).div_(n).tril_()
        learned = torch.addmm(lower @ w, s[:, block].T, residual, beta=-1, alpha=1 / n)
        if product is not None:
            learned += product[block]
        if lr:
            system = torch.eye(len(w), dtype=w.dtype, device=w.device).add_(lower, alpha=lr)
            learned = torch.linalg.solve_triangular(system, learned, upper=False)
        change[block] = learned
        residual.addmm_(u[:, block], torch.add(w, learned, alpha=lr) if lr else w, alpha=-1)
    return change
