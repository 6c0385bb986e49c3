"""Layers with a state or a statistic of their own: ordinary modules, for networks that learn by rules of the brain."""

from .rbm import RBM

__all__ = ["RBM"]
