"""`OnePass`: rules for which one ordinary forward pass, and at most one backward pass, is enough."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from .probe import Probe
from .rule import Estimate, LearningRule

__all__ = ["OnePass"]


class OnePass(LearningRule):
    """A rule that learns from the passes a user makes anyway, so that the classic loop works without a closure.

    ``loss.backward(); optimizer.step()`` and ``optimizer.step(closure)`` are both for it, and `bioopt.Mixed` lets all
    such rules, and optimizers of torch, share one evaluation: `begin`, then a pass, then a backward pass that reaches
    `gradient_parameters`, then `collect`.
    """

    splits_batch = True
    shares_pass = True

    @abstractmethod
    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """As `LearningRule.collect`."""

    def _estimate(self, probe: Probe) -> Estimate:
        self.begin()
        losses, _ = probe.gradients(self.gradient_parameters(), [self._recorder.reach.anchor])
        return losses, *self.collect(losses)
