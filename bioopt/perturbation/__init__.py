"""The perturbation family: change weights or activities at random, and learn from the change of the loss.

==================== ============================================================================================
`weights`            the same direction of weights for all samples: `WeightPerturbation`, `SerialPerturbation`,
                     `HillClimbing`
`activities`         noise on postsynaptic activity: `NodePerturbation`
`rank_one`           a direction of weights for each sample: `RankOnePerturbation`
`forward`            exact slopes along random directions: `ForwardGradient`
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
