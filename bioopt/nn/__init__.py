"""Layers with a state or a statistic of their own: ordinary modules, for networks that learn by rules of the brain."""

from .hopfield import Hopfield, ModernHopfield, Recall, SpikingHopfield
from .short_term import FastWeights, ShortTermMemory

__all__ = ["FastWeights", "Hopfield", "ModernHopfield", "Recall", "ShortTermMemory", "SpikingHopfield"]
