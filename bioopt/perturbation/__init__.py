"""The perturbation family: change weights or activities at random, see what it does to the loss, keep what helps.

==================== ============================================================================================
`weights`            one direction in the space of weights after another: `WeightPerturbation`, `SerialPerturbation`,
                     `HillClimbing`
`activities`         noise on postsynaptic activity: `NodePerturbation`
`rank_one`           a direction in the space of weights for each sample: `RankOnePerturbation`
`forward`            slopes along random directions, exact: `ForwardGradient`
==================== ============================================================================================

All but `HillClimbing` estimate the gradient of the mean loss; none needs a backward pass.
"""

from .activities import NodePerturbation
from .forward import ForwardGradient
from .rank_one import RankOnePerturbation
from .weights import HillClimbing, SerialPerturbation, WeightPerturbation

__all__ = [
    "ForwardGradient",
    "HillClimbing",
    "NodePerturbation",
    "RankOnePerturbation",
    "SerialPerturbation",
    "WeightPerturbation",
]
