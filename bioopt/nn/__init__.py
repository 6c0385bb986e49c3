"""Modules that `torch.nn` does not have: memories, routing, a Boltzmann machine and spike encodings of images."""

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
