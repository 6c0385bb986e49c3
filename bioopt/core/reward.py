"""Reward prediction error, the third factor of rules that learn from reward."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import loss_of, mean_over_samples
from .rule import LearningRule


def reward_prediction_errors(
    rule: LearningRule, losses: Tensor, per_sample: bool, rate: float
) -> tuple[Tensor, float | None]:
    """``(R - R̄) / trials`` of each trial, of each sample or of all, with the reward ``R`` minus the loss.

    With one trial, ``R̄`` is the running mean of the reward, the rule's own state ``"reward"`` (in the first step, the
    mean reward of that step), whose value after the step is returned too. With several, it is the mean reward of the
    other trials, of each sample: what was to be expected of that very sample.

    Args:
        rule: the rule.
        losses: of all trials, stacked.
        per_sample: whether each sample has its own reward.
        rate: of the running mean.
    """
    trials, rule._samples = len(losses), losses[0].numel()
    rewards = torch.stack([-mean_over_samples(one) if per_sample else -loss_of(one) for one in losses])
    if trials > 1:
        return (rewards - rewards.mean(0)) / (trials - 1), None
    mean = loss_of(losses)
    rule._average_over_ranks([mean])
    reward = -mean.item()
    if not losses.numel():  # no reward was given
        return rewards, rule._own_state.get("reward")
    expected = rule._own_state.get("reward", reward)
    return rewards - expected, expected + rate * (reward - expected)
