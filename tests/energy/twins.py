"""The energy rules written out for a network of tanh layers: loops over samples and layers, no autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

Layers = list[tuple[Tensor, Tensor]]  # weights and biases


def layers_of(model: nn.Sequential) -> Layers:
    return [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model if isinstance(m, nn.Linear)]


def network(sizes: tuple[int, ...] = (6, 5, 4, 4, 3), seed: int = 0) -> nn.Sequential:
    """Linear layers and tanh in turn, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for a, b in pairwise(sizes):
            modules += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*modules[:-1]).double()


def data(n: int = 7, sizes: tuple[int, int] = (6, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, sizes[0], generator=generator, dtype=torch.float64)
    return x, torch.randint(sizes[1], (n,), generator=generator)


def forward(layers: Layers, x: Tensor) -> list[Tensor]:
    """The predictions of one sample when each state equals its prediction."""
    found, h = [], x
    for w, b in layers:
        found.append(w @ h + b)
        h = found[-1].tanh()
    return found


def predictions(layers: Layers, x: Tensor, z: list[Tensor]) -> list[Tensor]:
    """The predictions of one sample from its states."""
    below = [x, *(state.tanh() for state in z)]
    return [w @ h + b for (w, b), h in zip(layers, below, strict=True)]


def output_error(u: Tensor, y: Tensor) -> Tensor:
    """The gradient of a sample's cross entropy by the outputs."""
    return u.softmax(0) - nn.functional.one_hot(y, len(u)).to(u)


def powers(layers: Layers, x: Tensor, relative: bool) -> list[Tensor]:
    """The mean square of each hidden layer's activity over samples."""
    all_of = [forward(layers, sample) for sample in x]
    return [
        torch.stack([u[i] for u in all_of]).square().mean() if relative else torch.ones((), dtype=x.dtype)
        for i in range(len(layers) - 1)
    ]


def signals(layers: Layers, x: Tensor, y: Tensor, z: list[Tensor], power: list[Tensor], nudge: float, hopfield: bool):
    """What each layer's prediction is pulled by: minus the derivative of the free energy by it, of one sample."""
    u = predictions(layers, x, z)
    hidden = [state if hopfield else (state - v) / p for state, v, p in zip(z, u[:-1], power, strict=True)]
    return [*hidden, -nudge * output_error(u[-1], y)], u


def step_of_states(
    layers: Layers,
    x: Tensor,
    y: Tensor,
    z: list[Tensor],
    power: list[Tensor],
    rate: float,
    nudge: float,
    hopfield: bool,
) -> list[Tensor]:
    """The states of one sample after a step of relaxation, all at once."""
    s, u = signals(layers, x, y, z, power, nudge, hopfield)
    moved = []
    for i, state in enumerate(z):
        own = state - u[i] if hopfield else s[i]
        above = (1 - state.tanh() ** 2) * (layers[i + 1][0].T @ s[i + 1])
        state = state - rate * power[i] * (own - above)
        moved.append(state.clamp(1e-6, 1) if hopfield else state)
    return moved


def step_of_weights(
    layers: Layers, x: Tensor, y: Tensor, z: list[list[Tensor]], power: list[Tensor], nudge: float, hopfield: bool
) -> Layers:
    """The gradients of the free energy per sample, summed over samples one by one."""
    grads = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in layers]
    for sample, label, states in zip(x, y, z, strict=True):
        s, _ = signals(layers, sample, label, states, power, nudge, hopfield)
        for i, h in enumerate([sample, *(state.tanh() for state in states)]):
            grads[i][0].sub_(torch.outer(s[i], h) / len(x))
            grads[i][1].sub_(s[i] / len(x))
    return grads


def predictive_coding(
    layers: Layers, x: Tensor, y: Tensor, steps: int, rate: float, relative: bool, lr: float | None = None
) -> Layers:
    """With ``lr``, weights move along with the states; the gradients of all steps are summed."""
    power = powers(layers, x, relative)
    z = [forward(layers, sample)[:-1] for sample in x]
    total = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in layers]
    for _ in range(steps):
        grads = step_of_weights(layers, x, y, z, power, 1.0, False)
        z = [step_of_states(layers, *one, power, rate, 1.0, False) for one in zip(x, y, z, strict=True)]
        if lr is not None:
            scales = [*power, 1.0]  # each layer in its own units
            grads = [(g * scale, d * scale) for (g, d), scale in zip(grads, scales, strict=True)]
            layers = [(w - lr * g, b - lr * d) for (w, b), (g, d) in zip(layers, grads, strict=True)]
            total = [(w + g, b + d) for (w, b), (g, d) in zip(total, grads, strict=True)]
    return total if lr is not None else step_of_weights(layers, x, y, z, power, 1.0, False)


def with_errors(layers: Layers, x: Tensor, y: Tensor, steps: int, rate: float, relative: bool) -> Layers:
    """Errors relax in place of states, by gradients through the whole network."""
    power = powers(layers, x, relative)
    z = []
    for sample, label in zip(x, y, strict=True):
        errors = [torch.zeros_like(b) for _, b in layers[:-1]]
        for step in range(steps + 1):
            states, h = [], sample
            for (w, b), e in zip(layers, errors, strict=False):
                states.append(w @ h + b + e)
                h = states[-1].tanh()
            if step == steps:
                break
            g = output_error(layers[-1][0] @ h + layers[-1][1], label)
            for i in reversed(range(len(errors))):
                g = (1 - states[i].tanh() ** 2) * (layers[i + 1][0].T @ g)
                errors[i] = errors[i] - rate * power[i] * (errors[i] / power[i] + g)
        z.append(states)
    return step_of_weights(layers, x, y, z, power, 1.0, False)


def equilibrium_propagation(
    layers: Layers, x: Tensor, y: Tensor, betas: tuple[float, float], steps: tuple[int, int], rate: float,
    relative: bool, hopfield: bool,
) -> Layers:  # fmt: skip
    """Both phases start from the free states."""
    power = powers(layers, x, relative and not hopfield)
    free = [forward(layers, sample)[:-1] for sample in x]
    if hopfield:
        free = [[state.clamp(1e-6, 1) for state in z] for z in free]
        for _ in range(steps[0]):
            free = [step_of_states(layers, *one, power, rate, 0.0, True) for one in zip(x, y, free, strict=True)]
    found = []
    for beta in betas:
        z = free
        for _ in range(steps[1] if beta else 0):
            z = [step_of_states(layers, *one, power, rate, beta, hopfield) for one in zip(x, y, z, strict=True)]
        found.append(step_of_weights(layers, x, y, z, power, beta, hopfield))
    scale = betas[0] - betas[1]
    return [((a - c) / scale, (b - d) / scale) for (a, b), (c, d) in zip(*found, strict=True)]


def dual_propagation(
    layers: Layers, x: Tensor, y: Tensor, beta: float, steps: int, rate: float, relative: bool
) -> Layers:
    """Two states of each neuron, sample by sample."""
    power = powers(layers, x, relative)
    grads = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in layers]
    for sample, label in zip(x, y, strict=True):
        sides = [forward(layers, sample)[:-1]] * 2
        for _ in range(steps):
            u = [predictions(layers, sample, z) for z in sides]
            difference = [(p - m) / s for p, m, s in zip(*sides, power, strict=True)]
            moved = []
            for sign, z, own in zip((1, -1), sides, u, strict=True):
                errors = [*difference, -beta * output_error(own[-1], label)]
                moved.append([])
                for i, state in enumerate(z):
                    pull = (1 - state.tanh() ** 2) * (layers[i + 1][0].T @ errors[i + 1])
                    mean = (u[0][i] + u[1][i]) / 2
                    moved[-1].append(state - rate * (state - mean - sign * power[i] / 2 * pull))
            sides = moved
        difference = [(p - m) / s for p, m, s in zip(*sides, power, strict=True)]
        for z in sides:
            errors = [*difference, -beta * output_error(predictions(layers, sample, z)[-1], label)]
            for i, h in enumerate([sample, *(state.tanh() for state in z)]):
                grads[i][0].sub_(torch.outer(errors[i], h) / (2 * beta * len(x)))
                grads[i][1].sub_(errors[i] / (2 * beta * len(x)))
    return grads
