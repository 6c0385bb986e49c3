"""The energy family: states in place of activities relax to low energy before the weights learn.

`base` has the base class and `states` what one evaluation with states gives; a rule defines the energy, and when weights
learn.
"""

from .base import EnergyRule
from .equilibrium import EquilibriumPropagation
from .predictive import PredictiveCoding

__all__ = ["EnergyRule", "EquilibriumPropagation", "PredictiveCoding"]
