r"""Centred presynaptic activity: each layer steps along its weights and its activity at the mean input.

A layer :math:`u = W x + b` is also :math:`u = W (x - \mu) + c` with :math:`c = b + W \mu`. Descent along :math:`W` and
:math:`c`, in place of :math:`W` and :math:`b`, has

.. math::
    \frac{\partial L}{\partial W}\Big|_c = \frac{\partial L}{\partial W} - \frac{\partial L}{\partial b}\, \mu^\top,
    \qquad \Delta b = \Delta c - \Delta W\, \mu

with the running mean :math:`\mu` of presynaptic activity: the product with :math:`x - \mu`, as in the covariance rule
(Sejnowski, 1977), and without the common mode of all inputs, which otherwise dominates steps where activity is positive
(LeCun, Bottou, Orr & Müller, 1998; Montavon & Müller, 2012). The model computes what it did.

Where `whitening` is on, the gradient by the weights is that of `bioopt.core.whitening`'s inputs :math:`\tilde x`:
descent in coordinates in which inputs are hardly correlated (Desjardins, Simonyan, Pascanu & Kavukcuoglu, 2015; for
node perturbation Dalm et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import whitening
from ._torch_private import in_dual_level
from .errors import is_captured
from .homeostasis import RATE, along_neurons, in_weight_form, kept_in_place
from .products import over_events
from .reach import weakly
from .synapse import BUILT_IN, Synapse

if TYPE_CHECKING:
    from .recorder import Firing

__all__ = ["Centring"]

#: of a synapse: ``"mean"``, that of its presynaptic activity, ``"steps"`` in which it was seen, and `whitening.PARTS`
Level: TypeAlias = dict[str, Any]


class Centring:
    """The running means and covariances of presynaptic activity of a rule's layers, and steps on what they leave.

    Args:
        every: whether all firings of a step count, or the first of each layer, in rules of several passes.
        apart: layers that learn otherwise.
        strength: of whitening; 0: none.
        levels: returns the present levels by the index of the synapse. Bound methods are held weakly.
    """

    def __init__(
        self, every: bool, apart: Collection[Any], strength: float, levels: Callable[[], dict[int, Level]]
    ) -> None:
        self._every, self._apart, self._strength, self._levels = every, apart, strength, weakly(levels)
        self._spared: Callable[[], Callable[[Synapse], bool] | None] | None = None
        self._seen: dict[Synapse, dict[str, Tensor]] = {}  # sums over the events of this step
        self._aside: dict[Synapse, dict[str, Tensor]] = {}  # likewise, from before `zero_grad`

    def spare(self, spared: Callable[[Synapse], bool]) -> None:
        """Leave out the whitening of layers for which a bound method, held weakly, returns ``True``."""
        self._spared = weakly(spared)

    def _whitens(self, synapse: Synapse) -> bool:
        spared = self._spared and self._spared()
        return bool(self._strength) and not (spared and spared(synapse))

    def clear(self) -> None:
        """Drop the firings since the last step."""
        self._seen, self._aside = {}, {}

    def set_aside(self) -> None:
        """Let the firings up to now, which `zero_grad` may have skipped, count only if no others follow."""
        if self._seen:
            self._seen, self._aside = {}, self._seen

    def restoring(self) -> Callable[[], None]:
        """A function that drops all firings but those of now."""
        seen, aside = dict(self._seen), dict(self._aside)

        def restore() -> None:
            self._seen, self._aside = seen, aside

        return restore

    @torch.no_grad()
    def note(self, firing: Firing) -> None:
        """Add the presynaptic activity of a firing."""
        synapse = firing.synapse
        known = self._seen.get(synapse)
        if (known is not None and not self._every) or synapse.layer in self._apart:
            return
        x = firing.x.detach()
        if in_dual_level():
            x = forward_ad.unpack_dual(x).primal
        sums: dict[str, Tensor] = {}
        if self._whitens(synapse) and synapse.weight.requires_grad:
            level = self._levels()().get(synapse.index)
            mean = None if level is None else in_weight_form(level["mean"], synapse)
            sums = whitening.moments(synapse, x, mean)
        if not sums and not can_centre(synapse):
            return
        channel = x.ndim + synapse.channel_dim
        sums["total"] = over_events(x, channel, torch.promote_types(x.dtype, torch.float32))
        sums["count"] = sums["total"].new_tensor(float(x.numel() // max(len(sums["total"]), 1)))
        if known is not None:
            sums = {name: known[name] + value for name, value in sums.items() if name in known}
        self._seen[synapse] = sums

    def followed(self, levels: dict[int, Level], add: Callable[[list[Tensor]], None]) -> dict[int, Level]:
        """The levels after the firings of this step, by the indices of their synapses.

        Args:
            levels: before it.
            add: replaces tensors by their sums over ranks that share the batch.
        """
        seen = sorted((self._seen or self._aside).items(), key=lambda item: item[0].index)
        self.clear()
        add([value for _, sums in seen for value in sums.values()])
        new = dict(levels)
        for (synapse, sums), told in zip(seen, _tell([sums for _, sums in seen]), strict=True):
            if not told:
                continue
            mean = sums["total"] / sums["count"].clamp(min=1)
            level = levels.get(synapse.index)
            steps = 0 if level is None else level["steps"]
            rate = max(RATE, 1 / (1 + steps))
            moved = mean if level is None else torch.lerp(level["mean"].to(mean), mean, rate)
            own = {"mean": moved, "steps": steps + 1}
            if self._whitens(synapse):
                own |= whitening.followed(sums, level, rate, self._strength, steps + 1, level is not None)
            new[synapse.index] = own if level is None else kept_in_place(level, own)
        return new

    @contextmanager
    def descending(
        self, levels: dict[int, Level], synapses: Iterable[Synapse], alike: Mapping[Tensor, Tensor]
    ) -> Iterator[None]:
        """Let the descent that is made inside the ``with`` block step on centred and whitened activity.

        Args:
            levels: by the indices of synapses.
            synapses: of the rule; of those that share their weights, the first counts.
            alike: weights -> a parameter that must take the same step.
        """
        given: list[tuple[Tensor, Tensor]] = []  # .grad, to be put back
        moving: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # weight, bias, the weight before, mean input
        done: set[Tensor] = set()
        for synapse in synapses:
            weight, bias = synapse.weight, synapse.bias
            level = levels.get(synapse.index)
            if level is None or weight.grad is None or weight in done:
                continue
            done.add(weight)
            of_bias = bias.grad if bias is not None and can_centre(synapse) else None
            inverse, mean = level.get("whitening"), in_weight_form(level["mean"].to(weight), synapse)
            if of_bias is None and inverse is None:
                continue
            for p in (weight, alike.get(weight)):
                if p is not None and p.grad is not None:
                    given.append((p, p.grad))
                    if of_bias is not None:
                        p.grad = _centred(p.grad, of_bias, mean)
                    if inverse is not None:
                        p.grad = whitening.whitened(p.grad, inverse)
            if bias is not None and of_bias is not None:
                moving.append((weight, bias, weight.detach().clone(), mean))
        try:
            yield
        finally:
            for p, grad in given:
                p.grad = grad
            for w, b, before, mean in moving:
                change = before.sub_(w)
                if w.ndim == 2:
                    b.addmv_(change, mean[0])
                else:
                    b.add_(change.mul_(mean).flatten(1).sum(1))


def _tell(sums: list[dict[str, Tensor]]) -> list[bool]:
    """Of each layer, whether it fired for any sample, and all that was seen is finite; in a CUDA graph, ``True``."""
    if not sums or is_captured([sums[0]["total"]]):
        return [True] * len(sums)
    total = torch.nn.utils.get_total_norm([value for one in sums for value in one.values()])
    *counts, norm = torch.stack([*(one["count"].to(total) for one in sums), total]).tolist()
    told = [count > 0 for count in counts]
    if math.isfinite(norm):
        return told
    return [t and all(bool(v.isfinite().all()) for v in one.values()) for t, one in zip(told, sums, strict=True)]


def _centred(gradient: Tensor, of_bias: Tensor, mean: Tensor) -> Tensor:
    """The gradient by weights at constant activity for the mean input, which is in the form of the weight."""
    if gradient.ndim == 2:
        return torch.addr(gradient, of_bias, mean[0], alpha=-1)
    return torch.addcmul(gradient, along_neurons(of_bias, gradient), mean, value=-1)


def can_centre(synapse: Synapse) -> bool:
    """Whether a layer is torch's own, with a bias that learns."""
    return type(synapse.layer) in BUILT_IN and synapse.free_bias is not None and synapse.weight.requires_grad
