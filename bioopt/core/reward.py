"""Reward prediction error, the third factor of rules that learn from reward."""

from __future__ import annotations

from torch import Tensor

from .losses import mean_over_samples
from .rule import LearningRule


def reward_prediction_error(rule: LearningRule, losses: Tensor, per_sample: bool, rate: float) -> tuple[Tensor, float]:
    """``R - R̄``, of each sample or of all, with the reward ``R`` minus the loss; and ``R̄`` after the step.

    ``R̄`` is the running mean of the reward, the rule's own state ``"reward"``; in the first step, the mean reward of
    that step.
    """
    mean = losses.mean()
    rule._sum_over_ranks([mean])
    reward = -mean.item() / rule._ranks[1]
    expected = rule._own_state.get("reward", reward)
    error = -(mean_over_samples(losses) if per_sample else losses.mean()) - expected
    return error, expected + rate * (reward - expected)
