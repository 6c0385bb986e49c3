"""The energy family: states in place of activities relax to low energy before the weights learn.

`base` has the base class, `states` one evaluation of a network with states; a rule defines the energy, and the phases
after which weights learn.
"""

from .base import EnergyRule
from .dual import DualPropagation
from .equilibrium import EquilibriumPropagation
from .predictive import PredictiveCoding

__all__ = ["DualPropagation", "EnergyRule", "EquilibriumPropagation", "PredictiveCoding"]
