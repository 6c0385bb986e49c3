"""Premultipliers of layers, by which steps of weights suit networks of any depth and width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .states import Wiring

__all__ = ["in_units", "premultipliers"]


def premultipliers(wiring: Wiring, params: Iterable[Tensor]) -> dict[Tensor, float]:
    r"""Those of depth-μP: :math:`1/\sqrt{D}` at the input, :math:`1/\sqrt{N L}` within, :math:`1/N` at the output.

    Args:
        wiring: of a network with :math:`L` layers that learn.
        params: of the network. Those of no layer have :math:`1/\sqrt L`.
    """
    inputs, outputs = set(wiring.inputs), set(wiring.outputs)
    found = {p: 1 / math.sqrt(wiring.depth) for p in params}
    for i in (*wiring.hidden, *wiring.outputs):
        synapse = wiring.synapses[i]
        fan_in = max(synapse.weight[0].numel(), 1)
        a = 1 / fan_in if i in outputs else 1 / math.sqrt(fan_in if i in inputs else fan_in * wiring.depth)
        found |= {p: a for p in synapse.parameters() if p in found}
    return found


@contextmanager
def in_units(scales: Mapping[Tensor, float]) -> Iterator[None]:
    """Divide parameters by their premultipliers inside a ``with`` block, and multiply by them after it.

    A parameter that stays as it is inside is the same bit for bit after it. Unlike in `bioopt.core.steps.in_shares`,
    weight decay is not scaled.
    """
    kept = [(p, p.clone(), a) for p, a in scales.items()]
    for p, _, a in kept:
        p.div_(a)
    try:
        yield
    finally:
        for p, before, a in kept:
            p.copy_(before + a * (p - before / a))
