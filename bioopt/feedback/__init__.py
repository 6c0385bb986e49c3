"""The feedback family: the error returns to each layer, but not by the layer's own weights.

`base` has what its rules share; each rule says which weights, or which other signal, the error returns by.
"""

from .base import FeedbackRule

__all__ = ["FeedbackRule"]
