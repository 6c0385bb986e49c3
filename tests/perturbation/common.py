"""A small regression network's batch, its losses and what a rule makes of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(8, 6, dtype=torch.float64, generator=GENERATOR), torch.randint(4, (8,), generator=GENERATOR)


def losses_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


def gradient(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(losses_of(model).mean(), list(model.parameters())))


def estimate(optimizer: bioopt.LearningRule, model: nn.Module, closure=None) -> list[Tensor]:
    optimizer.estimate(closure or (lambda: losses_of(model)))
    return [p.grad.clone() for p in model.parameters()]


def size(values: Tensor) -> float:
    """The root mean square, number by number."""
    return (sum(v * v for v in values.flatten().tolist()) / values.numel()) ** 0.5


def deviation(values: Tensor) -> float:
    """The size of an activity, samples × neurons: the root mean square of the neurons' deviations."""
    return values.detach().var(0).mean().sqrt().item()


def sizes(layers: list[nn.Module], relative: bool = True) -> list[float]:
    """Of each layer's weight and bias, to which a relative width refers."""
    found = []
    for layer in layers:
        found += [size(layer.weight), max(size(layer.bias), size(layer.weight))] if relative else [1.0, 1.0]
    return found


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def few_losses(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X[:4, :3]), Y[:4] % 3, reduction="none")
