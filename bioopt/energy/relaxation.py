"""The steps of one relaxation, and what they did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Relaxation"]


@dataclass
class Relaxation:
    """What one relaxation did, step by step.

    Attributes:
        nudge: the factor of the loss in the free energy.
        energy: the free energy before each step, per sample.
        residual: the norm of its gradient by the states before each step, per sample.
        taken_back: the number of steps that raised the free energy, and were taken back.
        scale: the factor of ``inference_lr`` in the end: 1, halved for each step that was taken back.
    """

    nudge: float
    energy: list[float] = field(default_factory=list)
    residual: list[float] = field(default_factory=list)
    taken_back: int = 0
    scale: float = 1.0


class Descent:
    """Where the states of a relaxation were when the free energy was last lowered, and its gradient there.

    Attributes:
        done: what the relaxation did so far.
        states: by the numbers of their firings.
        gradients: of those that the next step moves.
        lowered: the number of evaluations that lowered the free energy, the first included.
    """

    def __init__(self, nudge: float) -> None:
        self.done = Relaxation(nudge)
        self.states: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.lowered = 0
        self._lowest = math.inf

    def arrive(
        self, states: dict[int, Tensor], gradients: dict[int, Tensor], energy: float, residual: float, rounding: float
    ) -> None:
        """Go on from these states, or halve the rate and go back, if their energy is higher by more than rounding."""
        self.done.energy.append(energy)
        self.done.residual.append(residual)
        if self.lowered and not energy <= self._lowest + rounding * abs(self._lowest):  # NaN is no lower energy
            self.done.taken_back += 1
            self.done.scale /= 2
            return
        self.lowered += 1
        self.states, self.gradients, self._lowest = states, gradients, energy
