"""The curvature of the loss, by which the readout shortens its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core import curvature

Loss = Callable[[Tensor, Tensor], Tensor]


def squares(u: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(u, t)


def task(outputs: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))
    x = torch.randn(1000, 20)
    t = (x[:, :3].sum(1, keepdim=True) * torch.linspace(1, 2, outputs)).tanh()
    return model, x, (t - t.mean(0)) / t.std(0)


def train(optimizer: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Loss, batch: int, steps: int = 150) -> float:
    for _ in range(steps):
        index = torch.randint(len(x), (batch,))
        optimizer.target = t[index]

        def closure(index: Tensor = index) -> Tensor:
            optimizer.zero_grad()
            found = loss(model(x[index]), t[index])
            if found.requires_grad:
                found.backward()
            return found

        optimizer.step(closure)
    return float(loss(model.eval()(x), t).detach())


@pytest.mark.parametrize(
    ("rule", "batch"),
    [
        (bioopt.Hebbian, 16),
        (bioopt.Hebbian, 64),
        (bioopt.SoftHebb, 16),
        (bioopt.Oja, 16),
        (bioopt.LocalContrastive, 16),
    ],
)
@pytest.mark.long
def test_the_readout_learns_regression(rule: Any, batch: int) -> None:
    model, x, t = task(1)
    options = {"classes": 2} if rule is bioopt.LocalContrastive else {}
    assert train(rule(model, **options), model, x, t, squares, batch) < 0.6


@pytest.mark.parametrize("scale", [1e-2, 100.0])
def test_the_scale_of_targets_does_not_matter(scale: float) -> None:
    model, x, t = task(1)
    assert train(bioopt.Hebbian(model), model, x, scale * t, squares, 32) < 0.6 * scale**2


@pytest.mark.parametrize(("outputs", "expected"), [(1, 2.0), (4, 0.5)])
def test_the_curvature_of_squares_is_found(outputs: int, expected: float) -> None:
    model, x, t = task(outputs)
    optimizer = bioopt.Homeostasis(model, lr=0.0)
    train(optimizer, model, x, t, squares, 64, 300)
    (level,) = optimizer._own_state["readout"].values()
    assert float(level["response"] / level["moved"]) == pytest.approx(expected, rel=0.25)
    assert float(curvature.excess(level)) == pytest.approx(max(1.0, 2 * expected), rel=0.25)


def test_cross_entropy_is_not_slowed() -> None:
    model, x, t = task(1)
    optimizer = bioopt.Homeostasis(model, lr=0.0)

    def loss(u: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(u, (t > 0).float())

    train(optimizer, model, x, t, loss, 64)
    (level,) = optimizer._own_state["readout"].values()
    assert float(curvature.excess(level)) == 1


def test_against_a_twin() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), layer).double()
    optimizer = bioopt.Homeostasis(model, lr=0.0)
    means: list[Tensor] | None = None
    response = moved = 0.0
    for step in range(6):
        x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
        optimizer.zero_grad()
        h = model[:2](x).detach()
        F.cross_entropy(model(x), y).backward()
        own = [p.detach().clone() for p in layer.parameters()]
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        if means is None:
            means = own
        else:
            w, b = (p - m for p, m in zip(own, means, strict=True))
            r = 1 / step
            response += r * (float((w * grads[0]).sum() + (b * grads[1]).sum()) - response)
            moved += r * (float(sum((w @ one + b).square().sum() for one in h)) / 8 - moved)
            means = [m + (p - m) / (1 + step) for p, m in zip(own, means, strict=True)]
        optimizer.step()
        (level,) = optimizer._own_state["readout"].values()
        assert float(level["response"]) == pytest.approx(response, rel=1e-5)
        assert float(level["moved"]) == pytest.approx(moved, rel=1e-5)
        assert torch.allclose(level["weight"], means[0])
