"""`OnePass`: rules that need one ordinary forward pass and at most one backward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from .probe import Probe
from .rule import Estimate, LearningRule, optional

__all__ = ["OnePass"]


class OnePass(LearningRule):
    """A rule that learns from one ordinary training pass, so that the classic loop works without a closure.

    ``loss.backward(); optimizer.step()`` works as well as ``optimizer.step(closure)``. In `bioopt.Mixed`, all such
    rules and torch's optimizers share one evaluation: `begin`, a forward pass, a backward pass that reaches
    `gradient_parameters`, and `collect`.
    """

    splits_batch = True
    shares_pass = True

    @abstractmethod
    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """As `LearningRule.collect`."""

    @optional
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; of the presynaptic activity from before, nothing counts that another pass follows."""
        super().zero_grad(set_to_none)
        if self._centring is not None:
            self._centring.set_aside()

    def _estimate(self, probe: Probe) -> Estimate:
        self.begin()
        losses = self._with_gradients(probe, self.gradient_parameters())
        return losses, *self.collect(losses)
