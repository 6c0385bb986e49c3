"""Scripted spikes, and the pairs of them that a slow twin visits."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


class Scripted(nn.Module):
    """Neurons that emit given spikes, time step by time step, over and over, whatever their input."""

    def __init__(self, spikes: Tensor) -> None:
        super().__init__()
        self.spikes, self.step = spikes, -1

    def forward(self, u: Tensor) -> Tensor:
        self.step = (self.step + 1) % len(self.spikes)
        return self.spikes[self.step]


def random_spikes(*shape: int, rate: float = 0.4, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).double()


def scripted(layer: nn.Module, spikes: Tensor) -> nn.Sequential:
    with torch.no_grad():
        layer.weight.uniform_(0.2, 0.8)
    return nn.Sequential(layer, Scripted(spikes)).double()


def play(model: nn.Module, x: Tensor) -> None:
    for spikes in x:
        model(spikes)


def pairs(x: Tensor, s: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Strengthening and weakening by every pair of spikes: x steps × samples × inputs, s steps × samples × neurons."""
    steps, samples, inputs = x.shape
    up, down = torch.zeros(2, s.shape[2], inputs, dtype=torch.float64)
    for n, j, post in product(range(samples), range(s.shape[2]), range(steps)):
        if not s[post, n, j]:
            continue
        for i in range(inputs):
            down[j, i] += o["a_plus"] * o["x_target"] / samples
            for pre in range(steps):
                if x[pre, n, i]:
                    delay = (post - pre) * o["dt"]
                    if delay >= 0:
                        up[j, i] += o["a_plus"] * math.exp(-delay / o["tau_plus"]) / samples
                    else:
                        down[j, i] += o["a_minus"] * math.exp(delay / o["tau_minus"]) / samples
    return up, down


def bounded(up: Tensor, down: Tensor, w: Tensor, o: dict[str, Any], lr: float) -> Tensor:
    change = torch.zeros_like(w)
    for k in product(*map(range, w.shape)):
        if o["bounds"] == "soft":
            # Many small steps, each towards the bounds from where the weight has come to, in closed form.
            rate = float(up[k] + down[k])
            there = float(o["w_max"] * up[k] + o["w_min"] * down[k]) / rate if rate else float(w[k])
            change[k] = (there - w[k]) * (1 - math.exp(-lr * rate)) / lr
        else:
            change[k] = up[k] - down[k]
    if o.get("scaling"):
        for j in range(len(w)):
            grown = w[j] + lr * change[j]
            change[j] = (grown * w[j].sum() / grown.sum() - w[j]) / lr
    if o["bounds"] == "hard":
        for k in product(*map(range, w.shape)):
            change[k] = (min(max(w[k] + lr * change[k], o["w_min"]), o["w_max"]) - w[k]) / lr
    return change


WINDOW = {"tau_plus": 15.0, "tau_minus": 30.0, "dt": 2.0, "a_plus": 0.7, "a_minus": 0.5, "w_min": 0.1, "w_max": 0.9}
