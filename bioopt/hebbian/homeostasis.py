"""Homeostasis alone: the control of every rule that has it."""

from __future__ import annotations

from typing import Any, Unpack, final

from torch import Tensor

from ..core.local_product import LocalRule
from ..core.params import Params
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.sums import Sums
from ..core.synapse import Synapse


@final
class Homeostasis(LocalRule):
    r"""Each neuron keeps the mean and deviation of its activity through its own weights and bias.

    .. math::
        w_k \leftarrow (2 s_k)^{-r}\, w_k, \qquad b_k \leftarrow b_k + a - m_k

    with the running mean :math:`m_k` and deviation :math:`s_k` of the neuron's activity :math:`u = Wx + b` over events,
    at the rate :math:`r`, and the mean :math:`a` at which it is kept: 0 in convolutions, 1/2 in Linear layers, where
    ReLU at a mean of 0 would lose half of what a layer receives. The direction of a weight vector stays: the features
    are those of the initial weights.

    It is the control of every Hebbian rule with ``homeostasis=True``, which adds the rotation of weight vectors to it:
    what a rule has learned is the difference between the two. At ``lr=0`` the whole trunk stays as it is, and only
    the readout learns: a random trunk.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: rate :math:`r`, per step. It is 1 in the first step, so that activity is regulated from then on, and falls
            as 1 over the number of steps to ``lr``. 0: no homeostasis.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`.
        options: further options of the readout, ``descent``, its options and ``process_group``, as in `LocalRule`.

    Sources: G. G. Turrigiano & S. B. Nelson (2004), *Homeostatic plasticity in the developing nervous system*, Nature
    Reviews Neuroscience 5; bias: J. Triesch (2005), *A gradient rule for the plasticity of a neuron's intrinsic
    excitability*, ICANN.
    """

    homeostatic_rate = "lr"

    def __init__(
        self,
        params: Params,
        lr: float = 0.05,  # r
        *,
        readout: str | None = "delta",
        **options: Unpack[ReadoutOptions],
    ) -> None:
        super().__init__(params, lr, readout=readout, **options)

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The number of events alone."""
        return Sums({}, {"events": u.numel() // len(firing.synapse.weight)})

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """None."""
        return {}
