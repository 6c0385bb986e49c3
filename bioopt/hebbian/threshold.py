"""Rules that compare a neuron's activity with what it has been."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..optimizer import Constraint, Params, in_full
from ..recorder import Synapse
from ..synaptic import SynapticRule, over_events
from .pools import along_channels, rows_of, weight_shaped


class BCM(SynapticRule):
    r"""The BCM rule: activity above a sliding threshold strengthens a synapse, activity below weakens it.

    .. math::
        \Delta w_k = \frac{1}{\theta_k} \langle\, u_k\,(u_k - \theta_k)\,x \,\rangle, \qquad
        \theta_k \leftarrow \theta_k + r\,(\langle u_k^2 \rangle - \theta_k)

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`. The threshold :math:`\theta_k`, in units of
    :math:`u^2`, follows the neuron's mean squared activity and so bounds its weights without a decay, if it moves
    faster than they do; neurons become selective for a few of their inputs. Division by :math:`\theta_k` keeps the
    size of a step independent of the scale of :math:`u`. In the first step it is 1; then it is
    what was measured. A step that
    would be longer than a neuron's weights is cut to their length.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean event.
        threshold_rate: :math:`r`, in (0, 1], per step.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `SynapticRule`.
        options: further options of the readout, ``descent``, its options and ``process_group``, as in `SynapticRule`,
            whose errors are raised here as well. The thresholds are state, the same on all ranks.

    Sources: E. L. Bienenstock, L. N. Cooper & P. W. Munro (1982), *Theory for the development of neuron selectivity*,
    J. Neuroscience 2; divided by the threshold: C. C. Law & L. N. Cooper (1994), PNAS 91.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"threshold_rate": (lambda v: 0 < v <= 1, "a number in (0, 1]")}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        threshold_rate: float = 0.1,  # r
        readout: str | None = "delta",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, readout=readout, own={"threshold_rate": threshold_rate}, **options)

    def statistic(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``Σ u²``."""
        return over_events(in_full(u).square(), u.ndim + synapse.channel_dim)

    def advance(self, before: Tensor | None, mean: Tensor, group: dict[str, Any]) -> Tensor:
        """The threshold follows the mean squared activity."""
        return mean.clone() if before is None else torch.lerp(before, mean, group["threshold_rate"])

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``u (u - θ) / θ``."""
        threshold = self.running(synapse)
        u = in_full(u)
        if threshold is None:
            return u * (u - 1)
        told = u * along_channels(1 / threshold.clamp(min=1e-12), u, synapse)
        return told.sub_(1).mul_(u)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """The product, no step of a neuron longer than its weights."""
        change, weight = rows_of(product, synapse), rows_of(synapse.weight.detach(), synapse)
        length = group["lr"] * change.norm(dim=1, keepdim=True)
        change.mul_((weight.norm(dim=1, keepdim=True) / length.clamp(min=1e-12)).clamp(max=1))
        return weight_shaped(change, synapse)
