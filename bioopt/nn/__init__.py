"""Modules that `torch.nn` does not have: memories, routing, a Boltzmann machine, neurons with a time and encodings."""

from .encoding import LatencyEncoding, PoissonEncoding, RateEncoding
from .hopfield import Hopfield, ModernHopfield, Recall, SpikingHopfield
from .neurons import ALIF, LIF, ALIFState, LeakyRate
from .rbm import RBM
from .routing import Attention, Gate
from .short_term import FastWeights, ShortTermMemory

__all__ = [
    "ALIF",
    "LIF",
    "RBM",
    "ALIFState",
    "Attention",
    "FastWeights",
    "Gate",
    "Hopfield",
    "LatencyEncoding",
    "LeakyRate",
    "ModernHopfield",
    "PoissonEncoding",
    "RateEncoding",
    "Recall",
    "ShortTermMemory",
    "SpikingHopfield",
]
