"""Layers with a state or a statistic of their own: ordinary modules, for networks that learn by rules of the brain."""

from .hopfield import Hopfield, ModernHopfield, Recall, SpikingHopfield

__all__ = ["Hopfield", "ModernHopfield", "Recall", "SpikingHopfield"]
