"""Reward-modulated Hebbian learning, against a slow twin and against its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bioopt
from bioopt.core.noise import NoiseSource

from ..perturbation.common import X, Y, estimate, few_losses, flat
from ..rules import mlp


@pytest.mark.parametrize("credit", ["sample", "global"])
def test_reward_hebbian_equals_its_twin(credit: str) -> None:
    """Two moments an episode, three steps: traces, reward, and what was expected of it, one synapse at a time."""
    model, sigma, decay, rate = mlp(), 0.1, 0.6, 0.3
    optimizer = bioopt.RewardHebbian(
        model, 0.1, sigma=sigma, trace_decay=decay, reward_rate=rate, credit=credit, seed=2
    )
    first, second = model[0], model[2]
    moments = (X, 0.5 * X + 1)
    expected = None
    for step in range(3):
        stream = NoiseSource().stream(torch.device("cpu"), 2, step, 0)
        traces = [torch.zeros(8, *p.shape, dtype=p.dtype) for p in model.parameters()]
        with torch.no_grad():
            for x in moments:
                xi = [torch.randn(8, n, generator=stream, dtype=torch.float64) for n in (5, 4)]
                hidden = torch.tanh(first(x) + sigma * xi[0])
                out = second(hidden) + sigma * xi[1]
                for i, (pre, noise) in enumerate(((x, xi[0]), (hidden, xi[1]))):
                    for b in range(8):
                        for k in range(noise.shape[1]):
                            traces[2 * i][b, k] = decay * traces[2 * i][b, k] + noise[b, k] * pre[b]
                            traces[2 * i + 1][b, k] = decay * traces[2 * i + 1][b, k] + noise[b, k]
            rewards = -F.cross_entropy(out, Y, reduction="none")
            expected = rewards.mean() if expected is None else expected
            wanted = []
            for trace in traces:
                change = torch.zeros_like(trace[0])
                for b in range(8):
                    surprise = (rewards[b] - expected) / 8 if credit == "sample" else rewards.mean() - expected
                    change += surprise * trace[b] / sigma
                wanted.append(-change)
            expected = expected + rate * (rewards.mean() - expected)

        def episode() -> Tensor:
            model(moments[0])
            return F.cross_entropy(model(moments[1]), Y, reduction="none")

        for a, b in zip(wanted, estimate(optimizer, model, episode), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        optimizer.descend()


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
