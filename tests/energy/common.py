"""Networks and gradients that the tests of the energy family share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """``x + f(x)`` with batch norm and activations in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_a(self.a(x)), inplace=True)
        return F.relu(self.norm_b(self.b(h)) + x, inplace=True)


def residual(dropout: float = 0.0) -> nn.Sequential:
    """A stem, two residual blocks and a readout, for the images of `rules.batch`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
        blocks = [Residual(4), nn.AvgPool2d(2), Residual(4), nn.Flatten(), nn.Dropout(dropout)]
        return nn.Sequential(*stem, *blocks, nn.Linear(64, 5))


def gradients(rule: Any, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a rule estimates, with a seed of its own for dropout."""
    torch.manual_seed(3)
    rule.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_backpropagation(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient, with the same seed."""
    torch.manual_seed(3)
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values())), strict=True))
