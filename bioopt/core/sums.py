"""`Sums`: sums over the firings of a synapse since the last step, and whether they count."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .products import Events, SparseSignal, few_events, local_product, over_events
from .recorder import Firing


@dataclass(eq=False)
class Gathering:
    """The sums that count for one step, until the step has learned from them or they are dropped."""

    learned: bool = False
    dropped: bool = False
    parts: list[weakref.ref[Sums]] = field(default_factory=list)

    def end(self) -> None:
        """Mark all sums as learned, and free the values that a graph still holds."""
        self.learned = True
        for sums in (part() for part in self.parts):
            if sums is not None:
                sums.values, sums.few = {}, None


@dataclass(eq=False)
class Sums:
    """Sums of one synapse over samples and positions.

    Attributes:
        values: tensors by name: ``"product"``, Σ s xᵀ, of the weight's shape; ``"signal"``, Σ s, of the bias's shape,
            if there is one; and others that a rule needs.
        counts: numbers by name: ``"events"``, the number of positions of all samples; and others that a rule needs.
        of_firing: whether they are those of one firing, or a total.
        gathering: to which they have been added.
        few: the events themselves, in place of the product, where a rule prefers them.
    """

    values: dict[str, Tensor]
    counts: dict[str, float]
    of_firing: bool = True
    gathering: Gathering | None = None
    few: Events | None = None

    @property
    def events(self) -> float:
        """The number of events."""
        return self.counts["events"]

    @property
    def counted(self) -> bool:
        """Whether a step has learned from them, or the next one will."""
        return self.gathering is not None and not self.gathering.dropped

    @property
    def learned(self) -> bool:
        """Whether a step has learned from them."""
        return self.gathering is not None and self.gathering.learned

    def plus(self, other: Sums) -> Sums:
        """The sum with those of another firing, in place unless these are those of one firing.

        Values that only one of them has, because a rule began to act between the firings, are left out.
        """
        few = self.few.joined(other.few) if self.few and other.few else None
        if few is None:
            self.form_product()
            other.form_product()
        total = replace(self, of_firing=False) if self.of_firing else self
        total.few = few
        total.values = {
            name: one + other.values[name] if self.of_firing else one.add_(other.values[name])
            for name, one in self.values.items()
            if name in other.values
        }
        total.counts = {name: one + other.counts[name] for name, one in self.counts.items() if name in other.counts}
        return total

    def form_product(self) -> None:
        """Replace the events by their product."""
        if self.few is not None:
            self.values, self.few = {"product": self.few.product(), **self.values}, None


def add_up(grads: dict[Tensor, Tensor], others: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to those of the same parameters; one weight in two layers learns from both."""
    for p, g in others:
        grads[p] = grads[p] + g if p in grads else g


def product_sums(
    firing: Firing,
    u: Tensor,
    s: Tensor | SparseSignal,
    most: int = 0,
    **values: Tensor,
) -> Sums:
    """The sums of one firing: ``Σ s xᵀ``, and ``Σ s`` if there is a bias.

    Args:
        firing: of the synapse.
        u: its output, with the graph of the layer alone.
        s: the teaching signal, of ``u``'s shape or sparse.
        most: keep up to this number of events themselves, in place of their product.
        values: further sums over events.
    """
    synapse, channel = firing.synapse, u.ndim + firing.synapse.channel_dim
    few = few_events(firing, u, s, most)
    own = {}
    if few is None:
        own["product"] = local_product(firing, u, s) if u.numel() else torch.zeros_like(synapse.weight)
    if synapse.bias is not None or firing.standardised is not None:  # a product is centred by ``Σ s``
        size = u.shape[channel]
        own["signal"] = s.total(size) if isinstance(s, SparseSignal) else over_events(s, channel, synapse.weight.dtype)
    return Sums(own | values, {"events": u.numel() // u.shape[channel]}, few=few)
