"""The local family: each block of a network learns from a loss of its own, and no error passes between blocks.

`base` has the base class, which finds where a block ends and what it consists of; a rule defines the loss.
"""

from .base import BlockRule
from .blocks import Block
from .contrastive import LocalContrastive
from .forward_forward import ForwardForward
from .gradient import LocalGradientRule, LocalLossRule
from .local_loss import LocalLoss
from .mono_forward import MonoForward
from .perturbation import LocalPerturbation

__all__ = [
    "Block",
    "BlockRule",
    "ForwardForward",
    "LocalContrastive",
    "LocalGradientRule",
    "LocalLoss",
    "LocalLossRule",
    "LocalPerturbation",
    "MonoForward",
]
