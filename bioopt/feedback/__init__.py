"""The feedback family: the error returns to the layers by other weights than those of the forward pass.

`base` has the base classes; a rule defines the feedback weights, or another signal in place of the error.
"""

from .base import FeedbackRule
from .direct import DRTP, DirectFeedbackAlignment, DirectKolenPollack
from .fixed import FeedbackAlignment, SignSymmetry
from .learned import KolenPollack, WeightMirror

__all__ = [
    "DRTP",
    "DirectFeedbackAlignment",
    "DirectKolenPollack",
    "FeedbackAlignment",
    "FeedbackRule",
    "KolenPollack",
    "SignSymmetry",
    "WeightMirror",
]
