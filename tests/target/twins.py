"""Difference target propagation written out for a network of tanh layers: loops over samples and layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..energy.twins import Layers, output_error

Noise = dict[tuple[int, int, int], Tensor]  # by layer, step, and place (0: input, 1: end of the block), of all samples


def activities(layers: Layers, x: Tensor) -> list[list[Tensor]]:
    """For each sample, the input of each layer, and the output."""
    found = []
    for sample in x:
        h = [sample]
        for i, (w, b) in enumerate(layers):
            u = w @ h[-1] + b
            h.append(u if i == len(layers) - 1 else u.tanh())
        found.append(h)
    return found


def block(layers: Layers, i: int, h: Tensor) -> Tensor:
    """The map from the input of a layer to that of the next."""
    u = layers[i][0] @ h + layers[i][1]
    return u if i == len(layers) - 1 else u.tanh()


def inverse(v: Tensor, h: Tensor, target: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    """The inverse of a block with activity ``h`` at its end, applied to ``target``."""
    if bounds is None:  # the output
        return v.T @ target
    within = [min(max(t, bounds[0]), bounds[1]) for t in target]
    for i, (a, t) in enumerate(zip(h, target, strict=True)):
        if (a == bounds[0] and t < a) or (a == bounds[1] and t > a):  # extremes may move on
            within[i] = t
    return v.T @ ((1 - h**2) * torch.stack(within))


def ranges(layers: Layers, x: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """The range of activity at the end of each block."""
    ends = [torch.stack([h[i + 1] for h in activities(layers, x)]) for i in range(len(layers) - 1)]
    return [*((end.min(), end.max()) for end in ends), None]


def targets(layers: Layers, inverses: list[Tensor], x: Tensor, y: Tensor, beta: float) -> list[list[Tensor]]:
    """For each sample, the target at the end of each block."""
    found, bounds, top = [], ranges(layers, x), len(layers) - 1
    for h, label in zip(activities(layers, x), y, strict=True):
        down = [h[-1] - beta * output_error(h[-1], label)]
        for i in range(top, 0, -1):
            v, b = inverses[i], bounds[i]
            down.append(h[i] + inverse(v, h[i + 1], down[-1], b) - inverse(v, h[i + 1], h[i + 1], b))
        found.append(down[::-1])
    return found


def updates(layers: Layers, inverses: list[Tensor], x: Tensor, y: Tensor, beta: float) -> Layers:
    """The gradients of weights and biases towards the targets."""
    found = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in layers]
    for h, goals in zip(activities(layers, x), targets(layers, inverses, x, y, beta), strict=True):
        for i, goal in enumerate(goals):
            slope = torch.ones_like(goal) if i == len(layers) - 1 else 1 - h[i + 1] ** 2
            error = slope * (h[i + 1] - goal) / (beta * len(x))
            found[i][0].add_(torch.outer(error, h[i]))
            found[i][1].add_(error)
    return found


def learned(
    layers: Layers, inverses: list[Tensor], x: Tensor, noise: Noise, sigma: float, rate: float, steps: int
) -> list[Tensor]:
    """The weights of inverses after steps down their losses, along the gradient that autograd finds."""
    found, samples = list(inverses), activities(layers, x)
    for k in range(steps):
        for i in range(1, len(layers)):
            low = sigma * torch.stack([h[i] for h in samples]).square().mean().sqrt()
            high = sigma * torch.stack([h[i + 1] for h in samples]).square().mean().sqrt()
            bounds = ranges(layers, x)[i]

            def response(v: Tensor) -> Tensor:
                total = torch.zeros((), dtype=x.dtype)
                for j, h in enumerate(samples):
                    eta = noise[i, k, 1][j]  # noqa: B023
                    moved = inverse(v, h[i + 1], h[i + 1] + high * eta, bounds)  # noqa: B023
                    still = inverse(v, h[i + 1], h[i + 1], bounds)  # noqa: B023
                    total = total + ((moved - still) / high).square().sum() / 2  # noqa: B023
                return total

            def loss(v: Tensor) -> Tensor:
                total = response(v)
                for j, h in enumerate(samples):
                    xi = noise[i, k, 0][j]  # noqa: B023
                    end = block(layers, i, h[i] + low * xi)  # noqa: B023
                    change = inverse(v, h[i + 1], end, bounds) - inverse(v, h[i + 1], h[i + 1], bounds)  # noqa: B023
                    total = total - xi @ change / low  # noqa: B023
                return total

            (slope,) = torch.autograd.functional.jacobian(loss, (found[i],))
            curvature = 2 * response(slope)  # which is quadratic
            found[i] = found[i] - rate * slope.square().sum() / curvature * slope
    return found
