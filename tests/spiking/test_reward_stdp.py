"""Reward-modulated STDP, against eligibilities kept for each sample."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from .common import WINDOW, bounded, play, random_spikes, scripted


@pytest.mark.parametrize("bounds", ["soft", "hard", None])
@pytest.mark.parametrize("credit", ["sample", "global"])
def test_reward_equals_eligibilities_kept_for_each_sample(bounds: str | None, credit: str) -> None:
    o = {**WINDOW, "bounds": bounds}
    x, s = random_spikes(6, 3, 5), random_spikes(6, 3, 4, seed=1)
    model = scripted(nn.Linear(5, 4), s)
    optimizer = bioopt.RewardSTDP(model, 0.3, tau_e=10.0, reward_rate=0.25, credit=credit, **o)
    expected_reward = None
    for step in range(3):
        losses = torch.rand(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        reward = -losses if credit == "sample" else -losses.mean().expand(3)
        expected_reward = reward.mean() if expected_reward is None else expected_reward
        w = model[0].weight.detach().clone()
        change = torch.zeros_like(w)
        for n in range(3):
            e = torch.zeros_like(w)
            p, q = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            for t in range(6):
                p = math.exp(-o["dt"] / o["tau_plus"]) * p + x[t, n]
                q = math.exp(-o["dt"] / o["tau_minus"]) * q
                e = math.exp(-o["dt"] / 10.0) * e
                e += o["a_plus"] * torch.outer(s[t, n], p) - o["a_minus"] * torch.outer(q, x[t, n])
                q = q + s[t, n]
            change += (reward[n] - expected_reward) * e / 3
        expected = bounded(change.clamp(min=0), (-change).clamp(min=0), w, o, 0.3)

        def closure(losses=losses) -> Tensor:
            play(model, x)
            return losses

        optimizer.step(closure)
        torch.testing.assert_close(model[0].weight.detach(), w + 0.3 * expected, rtol=0, atol=1e-12)
        expected_reward = expected_reward + 0.25 * (reward.mean() - expected_reward)
    assert optimizer.forward_passes == 1


class Chance(nn.Module):
    """Neurons that fire the more probably, the more they are driven."""

    def forward(self, u: Tensor) -> Tensor:
        return (torch.rand(u.shape) < torch.sigmoid(8 * (u - 1))).to(u.dtype)


@pytest.mark.parametrize("swapped", [False, True])
def test_reward_alone_teaches_which_neuron_answers_which_input(swapped: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2, bias=False), Chance())
    nn.init.constant_(model[0].weight, 0.5)
    optimizer = bioopt.RewardSTDP(model, 0.02, dt=5.0)

    def answers(n: int = 32) -> tuple[Tensor, Tensor]:
        shown = torch.randint(2, (n,))
        active = F.one_hot(shown, 2).float().repeat_interleave(4, 1)
        total = sum(model((torch.rand(n, 8) < 0.5 * active).float()) for _ in range(8))
        wanted = 1 - shown if swapped else shown
        return total, wanted

    def closure() -> Tensor:
        total, wanted = answers()
        right = total.gather(1, wanted[:, None]) - total.gather(1, 1 - wanted[:, None])
        return -right.squeeze(1)

    for _ in range(300):
        optimizer.step(closure)
    total, wanted = answers(1000)
    chosen = total.argmax(1)
    assert (chosen == wanted).float().mean() > 0.95
    weight = model[0].weight.detach().view(2, 2, 4).mean(2)
    assert (weight[0, 0] > weight[0, 1]) != swapped
