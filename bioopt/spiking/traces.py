"""Traces of spikes, products of spikes and traces, and bounds of weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.constraints import NON_NEGATIVE, POSITIVE, Constraint
from ..core.recorder import Firing
from ..core.synapse import Synapse

BOUNDS = ("soft", "hard", None)
WINDOW: dict[str, Constraint] = {
    "tau_plus": POSITIVE,
    "tau_minus": POSITIVE,
    "dt": POSITIVE,
    "a_plus": NON_NEGATIVE,
    "a_minus": NON_NEGATIVE,
    "bounds": (lambda v: v in BOUNDS, "'soft', 'hard' or None"),
}


class Traces(NamedTuple):
    """The traces of the spikes of a sequence at one synapse."""

    pre: Tensor  #: of the presynaptic spikes, of their shape
    post: Tensor  #: of the postsynaptic ones


class TimeStep(NamedTuple):
    """The spikes and traces of one time step at one synapse."""

    x: Tensor  #: presynaptic spikes
    s: Tensor  #: postsynaptic spikes
    pre: Tensor  #: presynaptic trace, including the spikes of this step
    post: Tensor  #: postsynaptic trace, without the spikes of this step


def check_bounds(rule: str, group: dict[str, Any]) -> None:
    """Raise if the bounds of a group's weights are no interval."""
    low, high = group["w_min"], group["w_max"]
    for name, value in (("w_min", low), ("w_max", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{rule}: {name}={value!r} must be a finite number")
    if not low < high:
        raise ValueError(f"{rule}: w_min={low!r} must be below w_max={high!r}")


def advance(
    rule: str, firing: Firing, s: Tensor, before: Traces | None, group: dict[str, Any], remedy: str
) -> tuple[TimeStep, Traces]:
    """One time step, and the traces after it; ``before``: the traces before it; ``remedy``: for another batch size."""
    synapse, x = firing.synapse, firing.x.detach()
    for what, spikes in (("what enters", x), ("what follows", s)):
        if not bool(((spikes == 0) | (spikes == 1)).all()):
            low, high = spikes.min().item(), spikes.max().item()
            raise RuntimeError(
                f"{rule}: {what} layer '{synapse.name}' is not spikes, 0 or 1, but values from {low:.3g} to "
                f"{high:.3g}. Encode inputs as spikes (bioopt.nn has encodings), put no dropout, normalisation or "
                "average pooling between neurons and layer, and if other neurons follow the layer, name them: "
                f"neurons={{'{synapse.name}': ...}}"
            )
    dtype = torch.promote_types(synapse.weight.dtype, torch.float32)
    x, s = x.to(dtype), s.to(dtype)
    rows = firing.rows_of(s)
    if rows is not None:  # samples on other pathways are silent here, and their traces fade
        x, s = rows.among_all(x), rows.among_all(s)
    if before is None:
        pre, post = x.clone(), torch.zeros_like(s)
    else:
        if before.pre.shape != x.shape or before.post.shape != s.shape:
            raise RuntimeError(
                f"{rule}: layer '{synapse.name}' was given spikes of shape {tuple(x.shape)} in a sequence that began "
                f"with {tuple(before.pre.shape)}. {remedy}"
            )
        pre = torch.add(x, before.pre, alpha=math.exp(-group["dt"] / group["tau_plus"]))
        post = before.post * math.exp(-group["dt"] / group["tau_minus"])
    return TimeStep(x, s, pre, post), Traces(pre, post + s)


def add_product(total: Tensor, synapse: Synapse, post: Tensor, pre: Tensor, scale: float) -> None:
    """Add ``scale Σ post preᵀ``, summed over samples and positions, to ``total``, of the weight's shape."""
    if not scale:
        return
    if type(synapse.layer) is not nn.Linear:
        with torch.enable_grad():
            u = synapse.layer.forward(pre.to(synapse.weight.dtype))  # past the hooks
        (product,) = torch.autograd.grad(u, synapse.weight, post.to(u.dtype))
        total.add_(product, alpha=scale)
        return
    post, pre = post.reshape(-1, post.shape[-1]), pre.reshape(-1, pre.shape[-1])
    event, neuron = post.nonzero(as_tuple=True)
    if len(event) * 16 > post.numel():
        total.addmm_(post.T, pre, alpha=scale)
    else:  # few neurons have fired
        total.index_add_(0, neuron, pre[event].mul_(post[event, neuron].unsqueeze(1)), alpha=scale)


def bounded(up: Tensor, down: Tensor, weight: Tensor, group: dict[str, Any], scaling: bool = False) -> Tensor:
    """Strengthening less weakening (both >= 0), within the bounds, in the weight's dtype."""
    low, high, bounds, lr = group["w_min"], group["w_max"], group["bounds"], group["lr"]
    dtype, weight = weight.dtype, weight.to(up.dtype)
    change = up - down
    if bounds == "soft":
        rate = up + down
        change = high * up + low * down - weight * rate
        change *= torch.where(rate * lr > 0, -torch.expm1(-lr * rate) / (lr * rate), 1.0)
    if scaling:
        grown, total = change.flatten(1).sum(1), weight.flatten(1).sum(1)
        share = torch.where((total > 0) & (total + lr * grown > 0), grown / total, 0.0)
        share = share.view(-1, *[1] * (weight.ndim - 1))
        change = (change - weight * share) / (1 + lr * share)
    if bounds == "hard" and lr > 0:
        change = change.clamp((low - weight) / lr, (high - weight) / lr)
    return change.to(dtype)
