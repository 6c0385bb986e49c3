"""The feedback family: the error returns to the layers by other weights than those of the forward pass.

`base` has the base class; a rule defines the feedback weights, or another signal in place of the error.
"""

from .base import FeedbackRule

__all__ = ["FeedbackRule"]
