r"""Centred presynaptic activity: each layer steps along its weights and its activity at the mean input.

A layer :math:`u = W x + b` is also :math:`u = W (x - \mu) + c` with :math:`c = b + W \mu`. Descent along :math:`W` and
:math:`c`, in place of :math:`W` and :math:`b`, has

.. math::
    \frac{\partial L}{\partial W}\Big|_c = \frac{\partial L}{\partial W} - \frac{\partial L}{\partial b}\, \mu^\top,
    \qquad \Delta b = \Delta c - \Delta W\, \mu

with the running mean :math:`\mu` of presynaptic activity: the product with :math:`x - \mu`, as in the covariance rule
(Sejnowski, 1977), and without the common mode of all inputs, which otherwise dominates steps where activity is positive
(LeCun, Bottou, Orr & Müller, 1998; Montavon & Müller, 2012). The model computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._torch_private import in_dual_level
from .homeostasis import RATE, along_neurons, in_weight_form, kept_in_place
from .products import over_events
from .synapse import BUILT_IN, Synapse

if TYPE_CHECKING:
    from .recorder import Firing

__all__ = ["Centring"]

#: of a synapse: ``"mean"``, that of its presynaptic activity, and ``"steps"`` in which it was seen
Level: TypeAlias = dict[str, Any]


class Centring:
    """The running means of presynaptic activity of a rule's layers, and steps on centred activity.

    Args:
        every: whether all firings of a step count, or the first of each layer, in rules of several passes.
        apart: layers that learn otherwise.
    """

    def __init__(self, every: bool, apart: Collection[Any]) -> None:
        self._every, self._apart = every, apart
        self._seen: dict[Synapse, tuple[Tensor, int]] = {}  # sums over the events of this step, and their number

    def clear(self) -> None:
        """Drop the firings since the last step."""
        self._seen.clear()

    @torch.no_grad()
    def note(self, firing: Firing) -> None:
        """Add the presynaptic activity of a firing."""
        synapse = firing.synapse
        known = self._seen.get(synapse)
        if known is not None and not self._every:
            return
        if not can_centre(synapse) or synapse.layer in self._apart:
            return
        x = firing.x.detach()
        if in_dual_level():
            x = forward_ad.unpack_dual(x).primal
        channel = x.ndim + synapse.channel_dim
        total = over_events(x, channel, torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // max(len(total), 1)
        self._seen[synapse] = (total, count) if known is None else (known[0] + total, known[1] + count)

    def followed(self, levels: dict[int, Level], add: Callable[[list[Tensor]], None]) -> dict[int, Level]:
        """The levels after the firings of this step, by the indices of their synapses.

        Args:
            levels: before it.
            add: replaces tensors by their sums over ranks that share the batch.
        """
        seen = sorted(self._seen.items(), key=lambda item: item[0].index)
        self._seen.clear()
        sums = [(synapse, total, total.new_tensor(float(count))) for synapse, (total, count) in seen]
        add([value for _, *both in sums for value in both])
        new = dict(levels)
        for synapse, total, count in sums:
            mean = total / count.clamp(min=1)
            level = levels.get(synapse.index)
            if level is None:
                new[synapse.index] = {"mean": mean, "steps": 1}
                continue
            known, steps = level["mean"].to(mean.device), level["steps"]
            moved = torch.lerp(known, mean, max(RATE, 1 / (1 + steps)))
            new[synapse.index] = kept_in_place(level, {"mean": moved, "steps": steps + 1})
        return new

    @contextmanager
    def descending(
        self, levels: dict[int, Level], synapses: Iterable[Synapse], alike: Mapping[Tensor, Tensor]
    ) -> Iterator[None]:
        """Let the descent that is made inside the ``with`` block step on centred activity.

        Args:
            levels: by the indices of synapses.
            synapses: of the rule; of those that share their weights, the first counts.
            alike: weights -> a parameter that must take the same step.
        """
        given: list[tuple[Tensor, Tensor]] = []  # .grad, to be put back
        moving: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # weight, bias, the weight before, mean input
        for synapse in synapses:
            weight, bias = synapse.weight, synapse.bias
            shared = any(weight is known for known, *_ in moving)
            if synapse.index not in levels or not can_centre(synapse) or shared:
                continue
            if bias is None or bias.grad is None or weight.grad is None:
                continue
            mean = levels[synapse.index]["mean"].to(weight)
            mean = mean if weight.ndim == 2 else in_weight_form(mean, synapse)
            for p in (weight, alike.get(weight)):
                if p is not None and p.grad is not None:
                    given.append((p, p.grad))
                    p.grad = _centred(p.grad, bias.grad, mean)
            moving.append((weight, bias, weight.detach().clone(), mean))
        try:
            yield
        finally:
            for p, grad in given:
                p.grad = grad
            for w, b, before, mean in moving:
                change = before.sub_(w)
                if w.ndim == 2:
                    b.addmv_(change, mean)
                else:
                    b.add_(change.mul_(mean).flatten(1).sum(1))


def _centred(gradient: Tensor, of_bias: Tensor, mean: Tensor) -> Tensor:
    """The gradient by weights at constant activity for the mean input: a vector, or of the form of the weight."""
    if gradient.ndim == 2:
        return torch.addr(gradient, of_bias, mean, alpha=-1)
    return torch.addcmul(gradient, along_neurons(of_bias, gradient), mean, value=-1)


def can_centre(synapse: Synapse) -> bool:
    """Whether a layer is torch's own, with a bias that learns."""
    bias = synapse.bias
    known = type(synapse.layer) in BUILT_IN
    return known and bias is not None and bias.requires_grad and not synapse.fixed_bias and synapse.weight.requires_grad
