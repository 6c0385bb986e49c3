"""The rules against slow twins in double precision: each block a network of its own, its loss in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import cnn


def pooled(h: Tensor, size: int) -> list[Tensor]:
    """Of each sample, the mean activity in each of size × size parts of the image, or the activity itself."""
    if h.ndim == 2:
        return list(h)
    found = []
    for sample in h:
        parts = []
        for channel in sample:
            n = len(channel)
            edges = [((i * n) // min(size, n), -(-((i + 1) * n) // min(size, n))) for i in range(min(size, n))]
            parts += [channel[a:b, c:d].mean() for a, b in edges for c, d in edges]
        found.append(torch.stack(parts))
    return found


def cross_entropy(scores: list[Tensor], y: Tensor) -> Tensor:
    return -sum(torch.log(s[c].exp() / s.exp().sum()) for s, c in zip(scores, y, strict=True)) / len(y)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def similarity(h: Tensor, weight: Tensor, y: Tensor, classes: int) -> Tensor:
    features = []
    for sample in h:
        if sample.ndim == 1:
            features.append(weight @ sample)
        else:
            at = torch.stack([weight @ sample[:, i, j] for i in range(len(sample[0])) for j in range(len(sample[0]))])
            spread = (at - at.mean(0)).square().mean(0)
            features.append((spread + torch.finfo(h.dtype).eps).sqrt())
    hot = [torch.eye(classes, dtype=h.dtype)[c] for c in y]
    total = torch.zeros((), dtype=h.dtype)
    for i in range(len(y)):
        for j in range(len(y)):
            total = total + (correlation(features[i], features[j]) - correlation(hot[i], hot[j])) ** 2
    return total / len(y) ** 2


def local_loss(loss: str, beta: float) -> Callable[[Tensor, Any, Tensor], Tensor]:
    def of(h: Tensor, heads: Any, y: Tensor) -> Tensor:
        parts = []
        if loss != "similarity":
            head = heads["classifier"]
            parts.append(cross_entropy([head.weight @ f + head.bias for f in pooled(h, 2)], y))
        if loss != "cross_entropy":
            parts.append(similarity(h, heads["map"].weight, y, 5))
        return parts[0] if len(parts) == 1 else (1 - beta) * parts[0] + beta * parts[1]

    return of


def mono_forward(h: Tensor, head: Any, y: Tensor) -> Tensor:
    return cross_entropy([head.weight @ sample.flatten() for sample in h], y)


@pytest.mark.parametrize(
    ("rule", "options", "slow"),
    [
        (bioopt.LocalLoss, {"loss": "cross_entropy", "pool": 2}, local_loss("cross_entropy", 0)),
        (bioopt.LocalLoss, {"loss": "similarity", "pool": 2}, local_loss("similarity", 0)),
        (bioopt.LocalLoss, {"loss": "both", "pool": 2, "beta": 0.7}, local_loss("both", 0.7)),
        (bioopt.MonoForward, {}, mono_forward),
    ],
    ids=["cross_entropy", "similarity", "both", "MonoForward"],
)
def test_the_slow_twin_agrees(rule: Any, options: dict[str, Any], slow: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    model, twin = cnn(dropout=0.0).double(), cnn(dropout=0.0).double()
    sgd = {"momentum": 0.9, "weight_decay": 0.01}
    optimizer = rule(model, 0.1, descent=torch.optim.SGD, example=x, centre_inputs=False, **options, **sgd)
    # The twin's blocks and heads, which know nothing of each other.
    parts = [twin[:4], twin[4:7], twin[8]]
    heads = [*rule(twin, example=x, **options)._owned.modules.values()]
    plain = [
        torch.optim.SGD([*part.parameters(), *head.parameters()], 0.1, **sgd)
        for part, head in zip(parts, [*heads, nn.Identity()], strict=True)
    ]
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for _ in range(3):
        optimizer.target = y
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        inputs = [x]
        for part in parts:
            inputs.append(part(inputs[-1].detach()))
        losses = [slow(h, head, y) for h, head in zip(inputs[1:], heads, strict=False)]
        losses.append(cross_entropy(list(inputs[-1]), y))
        for one, loss in zip(plain, losses, strict=True):
            one.zero_grad()
            loss.backward()
            one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    owned = [p for head in heads for p in head.parameters()]
    for p, q in zip(optimizer._owned.modules.parameters(), owned, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
