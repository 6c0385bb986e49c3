"""Reward-modulated Hebbian learning, against a slow twin and against its gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bioopt
from bioopt.core.noise import NoiseSource

from ..perturbation.common import X, Y, deviation, estimate, few_losses, flat
from ..rules import mlp, same, weights


@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("trials", [1, 3])
def test_reward_hebbian_equals_its_twin(credit: str, relative: bool, trials: int) -> None:
    """Two moments an episode, three steps: traces, reward, and what was expected of it, one synapse at a time."""
    model, sigma, decay, rate = mlp(), 0.1, 0.6, 0.3
    options = {"sigma": sigma, "relative": relative, "trials": trials, "credit": credit}
    optimizer = bioopt.RewardHebbian(model, 0.1, trace_decay=decay, reward_rate=rate, seed=2, **options)
    layers = (model[0], model[2])
    moments = (X, 0.5 * X + 1)
    expected, powers = None, [None, None]
    for step in range(3):
        rewards, traces, activity = [], [], [[], []]
        widths = [sigma * power**0.5 if relative and power else None if relative else sigma for power in powers]
        with torch.no_grad():
            for trial in range(trials):
                stream = NoiseSource().stream(torch.device("cpu"), 2, step, trial)
                traces.append([torch.zeros(8, *p.shape, dtype=p.dtype) for p in model.parameters()])
                for x in moments:
                    for i, layer in enumerate(layers):
                        noise = torch.randn(8, len(layer.weight), generator=stream, dtype=torch.float64)
                        u = layer(x)
                        activity[i] += [u] if trial == 0 else []
                        widths[i] = sigma * deviation(u) if widths[i] is None else widths[i]  # the first of all firings
                        for b in range(8):
                            for k in range(noise.shape[1]):
                                at = traces[-1][2 * i], traces[-1][2 * i + 1]
                                at[0][b, k] = decay * at[0][b, k] + noise[b, k] * x[b]
                                at[1][b, k] = decay * at[1][b, k] + noise[b, k]
                        x = torch.tanh(u + widths[i] * noise) if i == 0 else u + widths[i] * noise
                rewards.append(-F.cross_entropy(x, Y, reduction="none"))
            expected = rewards[0].mean() if expected is None else expected
            wanted = [torch.zeros_like(p) for p in model.parameters()]
            for trial in range(trials):
                others = [rewards[j] for j in range(trials) if j != trial]
                for j, total in enumerate(wanted):
                    for b in range(8):
                        own = rewards[trial][b] if credit == "sample" else rewards[trial].mean()
                        baseline = expected
                        if others:
                            baseline = sum(r[b] if credit == "sample" else r.mean() for r in others) / len(others)
                        surprise = (own - baseline) / (8 if credit == "sample" else 1)
                        total -= surprise * traces[trial][j][b] / widths[j // 2] / trials
            expected = expected + rate * (rewards[0].mean() - expected)
            for i in range(2):
                power = deviation(torch.cat(activity[i])) ** 2
                powers[i] = power if powers[i] is None else powers[i] + rate * (power - powers[i])

        def episode() -> Tensor:
            model(moments[0])
            return F.cross_entropy(model(moments[1]), Y, reduction="none")

        for a, b in zip(wanted, estimate(optimizer, model, episode), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        optimizer.descend()
    assert optimizer.forward_passes == trials
    state = optimizer.state_dict()["state"]["rule"]
    assert ("reward" in state, "activity" in state) == (trials == 1, relative)


def test_running_sizes_go_on_from_a_checkpoint() -> None:
    def made() -> tuple[Any, bioopt.LearningRule]:
        model = mlp()
        return model, bioopt.RewardHebbian(model)

    model, optimizer = made()
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(X), Y, reduction="none"))
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, rule in ((model, optimizer), (twin, other)):
        rule.step(lambda one=one: F.cross_entropy(one(0.1 * X), Y, reduction="none"))
    assert same(weights(model), weights(twin))


def test_the_mean_change_of_reward_hebbian_is_the_gradient_of_reward() -> None:
    """Each sample many times in one batch: as many trials."""
    model = mlp(sizes=(3, 3, 3))
    x, y = X[:4, :3].repeat(2000, 1), (Y[:4] % 3).repeat(2000)
    true = flat(list(torch.autograd.grad(few_losses(model).mean(), list(model.parameters()))))
    optimizer = bioopt.RewardHebbian(model, 0.1, sigma=0.1)
    mean = sum(
        flat(estimate(optimizer, model, lambda: F.cross_entropy(model(x), y, reduction="none"))) for _ in range(100)
    ) / 100  # fmt: skip
    assert F.cosine_similarity(mean, true, dim=0) > 0.99
    assert abs((mean @ true) / (true @ true) - 1) < 0.1


def test_reward_hebbian_learns_from_a_scalar_reward_alone() -> None:
    """A reward for being near a target that the rule never sees."""
    torch.manual_seed(0)
    model, target = mlp(sizes=(3, 5, 2), dtype=torch.float32), torch.tensor([0.5, -0.3])
    optimizer = bioopt.RewardHebbian(model, 0.02, sigma=0.1)
    x = torch.ones(1, 3)
    with torch.no_grad():
        before = (model(x) - target).norm().item()
    for _ in range(500):
        optimizer.step(lambda: ((model(x) - target) ** 2).sum().item())
    model.eval()
    assert (model(x) - target).norm().item() < 0.2 * before
