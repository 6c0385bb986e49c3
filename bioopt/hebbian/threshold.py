"""Rules that compare a neuron's activity with a running mean of it."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.constraints import RATE, Constraint
from ..core.homeostasis import DEFAULTS
from ..core.local_product import LocalOptions, LocalRule, means
from ..core.params import Params
from ..core.products import along_channels, in_full, over_events, rows_of, weight_shaped
from ..core.recorder import Firing
from ..core.sums import Sums, product_sums
from ..core.synapse import Synapse


@final
class BCM(LocalRule):
    r"""Activity above a sliding threshold strengthens a synapse, activity below it weakens it.

    .. math::
        \Delta w_k = \frac{1}{\theta_k} \langle\, u_k\,(u_k - \theta_k)\,x \,\rangle, \qquad
        \theta_k \leftarrow \theta_k + r\,(\langle u_k^2 \rangle - \theta_k)

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`. The threshold :math:`\theta_k`, in units of
    :math:`u^2`, follows the neuron's mean squared activity and so bounds its weights without a decay, if it moves
    faster than they do; neurons become selective for a few of their inputs. Division by :math:`\theta_k` makes the size
    of a step independent of the scale of :math:`u`. In the first step the threshold is 1, and after it the mean squared
    activity of that step. A step longer than a neuron's weights is clipped to their length.

    That is the published formula, ``homeostasis=False``. By default, the unit weight vectors turn by
    :math:`\langle a_k\,(a_k - 1)\,\tilde x\rangle` with the rectified standardised activity :math:`a_k = \max(z_k, 0)`
    and whitened presynaptic activity :math:`\tilde x`, as in `LocalRule`: homeostasis keeps the mean squared activity,
    and so the threshold, at 1.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: the largest angle by which a neuron turns in a step; with ``homeostasis=False``, the learning rate, per mean
            event.
        threshold_rate: :math:`r`, in (0, 1], per step; without homeostasis.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`.
        options: ``homeostasis``, ``whitening``, ``inhibition``, ``tolerance`` and ``settle``; further options of the
            readout, ``descent``, its options and ``process_group``, as in `LocalRule`.
            The thresholds are state, the same on all ranks.

    Sources: E. L. Bienenstock, L. N. Cooper & P. W. Munro (1982), *Theory for the development of neuron selectivity*,
    J. Neuroscience 2; divided by the threshold: C. C. Law & L. N. Cooper (1994), PNAS 91.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"threshold_rate": RATE}
    regulated: ClassVar[dict[str, Any]] = DEFAULTS

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,  # η
        *,
        threshold_rate: float = 0.1,  # r
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        super().__init__(params, lr, readout=readout, own={"threshold_rate": threshold_rate}, **options)

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The sums of ``s = u (u - θ) / θ`` and ``x``, and ``Σ u²``."""
        if firing.standardised is not None:  # whose mean square, the threshold, is 1
            activity = firing.standardised.clamp(min=0)
            return product_sums(firing, u, activity * (activity - 1))
        activity, synapse = in_full(u.detach()), firing.synapse
        power = over_events(activity.square(), u.ndim + synapse.channel_dim)
        threshold = self.threshold(synapse)
        if threshold is None:
            s = activity * (activity - 1)
        else:
            s = activity * along_channels(1 / threshold.clamp(min=1e-12), synapse).to(activity.dtype)
            s.sub_(1).mul_(activity)
        return product_sums(firing, u, s, power=power)

    def threshold(self, synapse: Synapse) -> Tensor | None:
        """The threshold of each neuron of a synapse; ``None`` before the first step."""
        value: Tensor | None = self._own_state.get("running", {}).get(synapse.index)
        return None if value is None else value.to(synapse.weight.device)

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """The product, clipped to the length of a neuron's weights; the threshold follows the mean squared activity."""
        product, _ = means(sums)
        change, weight = rows_of(product, synapse), rows_of(synapse.weight.detach(), synapse)
        length = group["lr"] * change.norm(dim=1, keepdim=True)
        change.mul_((weight.norm(dim=1, keepdim=True) / length.clamp(min=1e-12)).clamp(max=1))
        power, before = sums.values["power"] / sums.events, self.threshold(synapse)
        after = power.clone() if before is None else torch.lerp(before, power, group["threshold_rate"])
        state["running"] = {**state.get("running", {}), synapse.index: after}
        return {synapse.weight: weight_shaped(change, synapse)}
