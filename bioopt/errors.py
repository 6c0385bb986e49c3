"""Errors that a caller may want to tell from others."""

from __future__ import annotations

import math

__all__ = ["Diverged"]


class Diverged(RuntimeError):
    """A loss, an update or a quantity of a rule's own is infinite or not a number. Nothing was changed by it.

    Attributes:
        parameter: the name of the weights with the largest norm, the first place to look at.
        norm: their norm.
        lr: the learning rate that moves them.
    """

    def __init__(
        self, message: str, parameter: str | None = None, norm: float = math.nan, lr: float = math.nan
    ) -> None:
        super().__init__(message)
        self.parameter, self.norm, self.lr = parameter, norm, lr
