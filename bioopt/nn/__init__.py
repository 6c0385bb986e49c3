"""Parts of networks that `torch.nn` has not: memories, routing, a Boltzmann machine, and images as spikes."""

from .encoding import LatencyEncoding, PoissonEncoding, RateEncoding
from .hopfield import Hopfield, ModernHopfield, Recall, SpikingHopfield
from .rbm import RBM
from .routing import Attention, Gate
from .short_term import FastWeights, ShortTermMemory

__all__ = [
    "RBM",
    "Attention",
    "FastWeights",
    "Gate",
    "Hopfield",
    "LatencyEncoding",
    "ModernHopfield",
    "PoissonEncoding",
    "RateEncoding",
    "Recall",
    "ShortTermMemory",
    "SpikingHopfield",
]
