"""The contrastive family: rules that compare what a network does with the data to what it does by itself.

The machines that they train are in `bioopt.nn`.
"""

from .contrastive_divergence import ContrastiveDivergence

__all__ = ["ContrastiveDivergence"]
