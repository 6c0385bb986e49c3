"""The target family: each layer learns from a target for its activity, which inverses carry down from the output.

`passes` has one evaluation of a network whose blocks are cut from each other; a rule defines the targets, and how its
inverses learn.
"""

from .difference import DifferenceTargetPropagation

__all__ = ["DifferenceTargetPropagation"]
