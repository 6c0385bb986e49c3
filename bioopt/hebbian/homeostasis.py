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
    r"""Each neuron keeps its activity at mean 0 and deviation 1 through its own weights and bias."""

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
