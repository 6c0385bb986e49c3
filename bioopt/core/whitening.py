r"""Whitening: presynaptic neurons that are active together inhibit each other before a rule reads them.

With the running covariance :math:`C` of a layer's inputs, and their mean variance :math:`\bar c`, lateral inhibition

.. math::
    \tilde x = x - \langle x \rangle - \frac{\kappa}{\bar c}\, C\, \tilde x \qquad \Leftrightarrow \qquad
    \tilde x = \Bigl(I + \frac{\kappa}{\bar c}\, C\Bigr)^{-1} (x - \langle x \rangle)

takes from the inputs what they have in common, as the retina does before the cortex learns (Atick & Redlich, 1992):
each lateral synapse has the covariance of the two neurons that it connects, which is Hebbian (Földiák, 1989). Only a
rule reads :math:`\tilde x`; no output of the network changes.

Layers that see one event of each sample, Linear layers mostly, keep their inputs as they are: a batch has fewer events
than they have inputs, so that a covariance would be mostly chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import is_captured
from .products import in_full, some_events
from .synapse import Synapse

MOST_INPUTS = 2048  # of a neuron; for more, the inhibition takes longer than the rule itself
MOST_EVENTS = 512  # of a firing, from which the covariance is measured
LEAST_EVENTS = 64

PARTS = ("covariance", "whitening")  # of a level: the running covariance, and the inhibition by it


def moments(synapse: Synapse, x: Tensor, mean: Tensor | None) -> dict[str, Tensor]:
    """The sums over some events that `followed` needs: of the inputs, of their products, and of 1.

    None for layers with one event a sample, with more than `MOST_INPUTS`, or of a kind that is not built in.

    Args:
        synapse: the layer.
        x: presynaptic activity.
        mean: its running mean, in the form of a weight, without which large numbers would cancel; ``None``: unknown.
    """
    neurons, inputs = len(synapse.weight) // synapse.pools, synapse.weight[0].numel()
    if inputs > MOST_INPUTS or (type(synapse.layer) is nn.Linear and x.ndim < 3):  # which is the same on all ranks
        return {}

    def most(events: int) -> int:
        """At most a quarter of the work of the local product of all events."""
        return max(LEAST_EVENTS, min(MOST_EVENTS, events * neurons // (4 * inputs)))

    seen = some_events(synapse, x, most)
    if seen is None:
        return {}
    seen = in_full(seen)
    if mean is not None:
        seen = seen - _of_pools(mean.to(seen), synapse)
    with torch.autocast(seen.device.type, enabled=False):  # a covariance in half precision may have no inverse
        product = seen.mT @ seen
    return {"seen": seen.new_tensor(float(seen.shape[1])), "seen_input": seen.sum(1), "seen_product": product}


def followed(
    sums: dict[str, Tensor], level: dict[str, Any] | None, rate: float, strength: float, step: int, centred: bool
) -> dict[str, Tensor]:
    r"""The running covariance, and at steps 1, 2, 4, 8, … the inhibition by it, as parts of the new level.

    Args:
        sums: with `moments`.
        level: the former level.
        rate: of the running covariance.
        strength: :math:`\kappa`.
        step: how many steps there were, with this one.
        centred: whether the running mean was known.
    """
    old = level or {}
    if "seen_product" not in sums or is_captured([sums["seen_product"]]):
        return {name: old[name] for name in PARTS if name in old}
    count = sums["seen"].clamp(min=1)
    covariance = sums["seen_product"] / count
    if not centred:
        mean = sums["seen_input"] / count
        covariance -= mean.unsqueeze(2) * mean.unsqueeze(1)
    if "covariance" in old:
        covariance = torch.lerp(old["covariance"].to(covariance), covariance, rate)
    if "whitening" in old and step & (step - 1):
        inverse = old["whitening"].to(covariance)
    else:
        inverse = inhibition(covariance, strength)
    return {"covariance": covariance, "whitening": inverse}


def inhibition(covariance: Tensor, strength: float) -> Tensor:
    """``(I + κ C / c̄)⁻¹`` of each pool; the identity where inputs do not vary, or too much for squares of them."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(covariance.dtype).tiny)
    system = covariance * (strength / variance).view(-1, 1, 1)
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(system)  # which does not wait for the device
    inverse = torch.cholesky_inverse(factor)
    found = inverse.isfinite().flatten(1).all(1).view(-1, 1, 1)
    return torch.where(found, inverse, torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device))


def whitened(product: Tensor, inverse: Tensor) -> Tensor:
    """A local product with whitened inputs, in place of one with centred inputs; of the weight's shape."""
    rows = in_full(product).reshape(len(inverse), -1, inverse.shape[-1])
    with torch.autocast(product.device.type, enabled=False):
        return (rows @ inverse.to(rows)).to(product.dtype).view(product.shape)


def _of_pools(mean: Tensor, synapse: Synapse) -> Tensor:
    """The mean input, in the form of a weight, as pools × 1 × inputs."""
    each = mean.expand(len(mean), *synapse.weight.shape[1:]).flatten(1)
    return each[:: max(1, len(each) // synapse.pools)].unsqueeze(1)
