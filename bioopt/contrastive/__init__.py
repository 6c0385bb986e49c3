"""The contrastive family: rules that compare activity driven by data with activity that the network generates.

The networks that they train are in `bioopt.nn`.
"""

from .contrastive_divergence import ContrastiveDivergence

__all__ = ["ContrastiveDivergence"]
