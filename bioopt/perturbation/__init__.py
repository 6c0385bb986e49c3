"""The perturbation family: change weights or activities at random, see what it does to the loss, keep what helps.

All these rules estimate the gradient of the mean loss from evaluations of it alone; none needs a backward pass.
"""

from .activities import NodePerturbation
from .forward import ForwardGradient
from .weights import SerialPerturbation, WeightPerturbation

__all__ = ["ForwardGradient", "NodePerturbation", "SerialPerturbation", "WeightPerturbation"]
