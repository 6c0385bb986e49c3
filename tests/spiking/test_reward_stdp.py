"""Reward-modulated STDP, against eligibilities kept for each sample."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from .common import WINDOW, bounded, play, random_spikes, scripted


@pytest.mark.parametrize(("bounds", "trials"), [("soft", 1), ("hard", 1), (None, 1), ("hard", 3), (None, 2)])
@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("tau_e", [10.0, 0.0])
def test_reward_equals_eligibilities_kept_for_each_sample(
    bounds: str | None, trials: int, credit: str, tau_e: float
) -> None:
    """Three steps of one trial or several, each with spikes of its own; with a time constant of 0 there is no trace."""
    o = {**WINDOW, "bounds": bounds, "x_target": 0.0 if trials == 1 else 0.4, "scaling": trials > 2}
    x, s = random_spikes(6, 3, 5), random_spikes(6 * trials, 3, 4, seed=1)
    model = scripted(nn.Linear(5, 4), s)
    optimizer = bioopt.RewardSTDP(model, 0.3, tau_e=tau_e, reward_rate=0.25, credit=credit, trials=trials, **o)
    expected_reward = None
    for step in range(3):
        losses = torch.rand(trials, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        reward = -losses if credit == "sample" else -losses.mean(1, keepdim=True).expand(trials, 3)
        expected_reward = reward.mean() if expected_reward is None else expected_reward
        w = model[0].weight.detach().clone()
        change = torch.zeros_like(w)
        for trial in range(trials):
            others = [reward[i] for i in range(trials) if i != trial]
            for n in range(3):
                e = torch.zeros_like(w)
                p, q = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
                for t in range(6):
                    spikes = s[6 * trial + t, n]
                    p = math.exp(-o["dt"] / o["tau_plus"]) * p + x[t, n]
                    q = math.exp(-o["dt"] / o["tau_minus"]) * q
                    e = (math.exp(-o["dt"] / tau_e) if tau_e else 0.0) * e
                    e += o["a_plus"] * torch.outer(spikes, p - o["x_target"]) - o["a_minus"] * torch.outer(q, x[t, n])
                    q = q + spikes
                baseline = sum(other[n] for other in others) / len(others) if others else expected_reward
                change += (reward[trial, n] - baseline) * e / 3 / trials
        expected = bounded(change.clamp(min=0), (-change).clamp(min=0), w, o, 0.3)
        made = iter(losses)

        def closure(made=made) -> Tensor:
            play(model, x)
            return next(made)

        optimizer.step(closure)
        torch.testing.assert_close(model[0].weight.detach(), w + 0.3 * expected, rtol=0, atol=1e-12)
        expected_reward = expected_reward + 0.25 * (reward.mean() - expected_reward)
    assert optimizer.forward_passes == trials
    assert ("rule" in optimizer.state_dict()["state"]) == (trials == 1)


def test_each_trial_draws_new_random_numbers() -> None:
    """The first of a step from the state that it begins with, so that the noise of a run is reproducible."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), Chance())
    optimizer = bioopt.RewardSTDP(model, trials=3)
    drawn: list[float] = []

    def closure() -> Tensor:
        drawn.append(torch.rand(()).item())
        return model((torch.rand(5, 4) < 0.5).float()).sum(1)

    for _ in range(2):
        torch.manual_seed(1)
        optimizer.step(closure)
    assert len(set(drawn)) == 3
    assert drawn[:3] == drawn[3:]


class Chance(nn.Module):
    """Neurons that fire the more probably, the more they are driven."""

    def forward(self, u: Tensor) -> Tensor:
        return (torch.rand(u.shape) < torch.sigmoid(8 * (u - 1))).to(u.dtype)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.long
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
