"""The feedback family: the error returns to each layer, but not by the layer's own weights.

`base` has what its rules share; a rule defines the weights, or the other signal, by which the error returns.
"""

from .base import FeedbackRule

__all__ = ["FeedbackRule"]
