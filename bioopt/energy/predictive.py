"""Predictive coding: states minimise the errors of predictions and the loss, then weights do."""

from __future__ import annotations

from typing import Unpack, final

import torch
from torch import Tensor

from ..core.constraints import POSITIVE_INT, Constraint, one_of
from ..core.params import Params, RuleOptions
from ..core.probe import Probe
from .base import EnergyRule
from .states import Evaluation

__all__ = ["PredictiveCoding"]

MODES: Constraint = one_of("state", "incremental", "error")


@final
class PredictiveCoding(EnergyRule):
    """TODO."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,  # η
        *,
        steps: int = 8,  # T
        inference_lr: float = 0.1,  # γ
        mode: str = "state",
        fixed_prediction: bool = False,
        **options: Unpack[RuleOptions],
    ) -> None:
        self._check_value("steps", steps, POSITIVE_INT)
        self._check_value("mode", mode, MODES)
        self._require_bool("fixed_prediction", fixed_prediction)
        self.steps, self.mode, self.fixed_prediction = steps, mode, fixed_prediction
        super().__init__(params, lr, inference_lr=inference_lr, **options)

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        """Half the squared error of the prediction."""
        return (z - u).square().sum() / 2

    def _learn(self, probe: Probe) -> tuple[Tensor, dict[Tensor, Tensor]]:
        evaluation = self._forward(probe)
        losses = evaluation.losses
        relaxed = self._relax(probe, evaluation, 1.0, self.steps)
        return losses, self._of_parameters(relaxed, 1.0)
