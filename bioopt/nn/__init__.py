"""Parts of networks that `torch.nn` has not: memories, a Boltzmann machine, and images as spikes."""

from .encoding import LatencyEncoding, PoissonEncoding, RateEncoding
from .hopfield import Hopfield, ModernHopfield, Recall, SpikingHopfield
from .rbm import RBM
from .short_term import FastWeights, ShortTermMemory

__all__ = [
    "RBM",
    "FastWeights",
    "Hopfield",
    "LatencyEncoding",
    "ModernHopfield",
    "PoissonEncoding",
    "RateEncoding",
    "Recall",
    "ShortTermMemory",
    "SpikingHopfield",
]
