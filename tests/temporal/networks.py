"""Small recurrent networks, the slow twin of e-prop, and the loops that train them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

import bioopt
from bioopt.nn import ALIF, LIF, LeakyRate

INPUTS, NEURONS, OUTPUTS, STEPS, SAMPLES = 3, 5, 2, 7, 3
SGD: dict[str, Any] = {"descent": torch.optim.SGD}
CELLS = {
    "LIF": lambda: LIF(4.0),
    "ALIF": lambda: ALIF(4.0, tau_adaptation=9.0, beta=0.4),
    "rate": lambda: LeakyRate(3.0),
}


class Recurrent(nn.Module):
    """One recurrent layer, or a second one above it, and a readout, which may be leaky."""

    def __init__(self, cell: str, leaky: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(NEURONS if i else INPUTS, NEURONS) for i in range(layers))
        self.recurrent = nn.ModuleList(nn.Linear(NEURONS, NEURONS, bias=False) for _ in range(layers))
        self.cells = nn.ModuleList(CELLS[cell]() for _ in range(layers))
        self.out = nn.Linear(NEURONS, OUTPUTS)
        self.readout = LeakyRate(5.0, None) if leaky else None

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        new, h = [], x
        for i, (inputs, recurrent, cell) in enumerate(zip(self.inputs, self.recurrent, self.cells, strict=True)):
            z, own = (x.new_zeros(len(x), NEURONS), None) if state is None else state[i]
            h, own = cell(inputs(h) + recurrent(z), own)
            new.append((h, own))
        y, own = self.out(h), None
        if self.readout is not None:
            y, own = self.readout(y, None if state is None else state[-1])
        return y, [*new, own]

    def forward(self, xs: Tensor) -> Tensor:
        state, ys = None, []
        for x in xs:
            y, state = self.step(x, state)
            ys.append(y)
        return torch.stack(ys)


def network(cell: str, leaky: bool = False, layers: int = 1) -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recurrent(cell, leaky, layers).double()
        with torch.no_grad():
            for layer in (*model.inputs, *model.recurrent):
                layer.weight.mul_(3)
    return model


def problem(seed: int = 0, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xs = (torch.rand(steps, SAMPLES, INPUTS, generator=generator) < 0.6).double()
    return xs, torch.randn(steps, SAMPLES, OUTPUTS, generator=generator, dtype=torch.float64)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (y - target).square().sum()


def detached(state: Any) -> Any:
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.detach()
    inner = [detached(value) for value in state]
    return state._make(inner) if hasattr(state, "_make") else inner


def online(optimizer: Any, model: Recurrent, xs: Tensor, target: Tensor) -> None:
    """The loop of the online mode, up to the step."""
    optimizer.reset()
    state = None
    for x, y in zip(xs, target, strict=True):
        output, state = model.step(x, detached(state))
        loss_of(output, y).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by_hand(cell: str, leaky: bool, model: Recurrent, feedback: Tensor, xs: Tensor, target: Tensor) -> dict[str, Any]:
    """The gradients of e-prop, one sample, synapse and time step at a time, forward in time.

    Args:
        cell: name of the neurons.
        leaky: whether the readout is.
        model: with one layer.
        feedback: outputs × neurons.
        xs: steps × samples × inputs.
        target: steps × samples × outputs.
    """
    w = [[*a, *b] for a, b in zip(model.inputs[0].weight.tolist(), model.recurrent[0].weight.tolist(), strict=True)]
    bias, out, shift = (p.tolist() for p in (model.inputs[0].bias, model.out.weight, model.out.bias))
    count = INPUTS + NEURONS + 1
    change = [[0.0] * count for _ in range(NEURONS)]
    of_out = [[0.0] * (NEURONS + 1) for _ in range(OUTPUTS)]
    neuron: Any = model.cells[0]
    alpha, kappa = neuron.decay, math.exp(-1 / 5) if leaky else 0.0
    beta = float(neuron.beta) if cell == "ALIF" else 0.0
    rho = neuron.adaptation_decay if cell == "ALIF" else 0.0
    for n in range(SAMPLES):
        v, a, z, psi, y = [0.0] * NEURONS, [0.0] * NEURONS, [0.0] * NEURONS, [0.0] * NEURONS, [0.0] * OUTPUTS
        of_v, of_a, kept = ([[0.0] * count for _ in range(NEURONS)] for _ in range(3))
        kept_out = [[0.0] * (NEURONS + 1) for _ in range(OUTPUTS)]
        for t in range(STEPS):
            seen = [*xs[t, n].tolist(), *z, 1.0]
            spikes = []
            for j in range(NEURONS):
                u = sum(weight * value for weight, value in zip([*w[j], bias[j]], seen, strict=True))
                for i in range(count):
                    of_a[j][i] = psi[j] * of_v[j][i] + (rho - psi[j] * beta) * of_a[j][i]
                    gain = 1 - alpha if cell == "rate" else 1.0
                    of_v[j][i] = alpha * of_v[j][i] + gain * seen[i]
                if cell == "rate":
                    v[j] = alpha * v[j] + (1 - alpha) * u
                    spikes.append(math.tanh(v[j]))
                    psi[j] = 1 - math.tanh(v[j]) ** 2
                    continue
                a[j] = rho * a[j] + z[j]
                v[j] = alpha * v[j] + u - z[j]
                distance = v[j] - 1 - beta * a[j]
                spikes.append(float(distance > 0))
                psi[j] = 0.3 * max(0.0, 1 - abs(distance))
            z = spikes
            for k in range(OUTPUTS):
                u = sum(weight * value for weight, value in zip([*out[k], shift[k]], [*z, 1.0], strict=True))
                y[k] = kappa * y[k] + (1 - kappa) * u
                for j, value in enumerate([*z, 1.0]):
                    kept_out[k][j] = kappa * kept_out[k][j] + (1 - kappa) * value
            error = [y[k] - float(target[t, n, k]) for k in range(OUTPUTS)]
            for k, j in itertools.product(range(OUTPUTS), range(NEURONS + 1)):
                of_out[k][j] += error[k] * kept_out[k][j]
            for j, i in itertools.product(range(NEURONS), range(count)):
                eligibility = psi[j] * (of_v[j][i] - beta * of_a[j][i])
                kept[j][i] = kappa * kept[j][i] + (1 - kappa) * eligibility
                change[j][i] += sum(float(feedback[k, j]) * error[k] for k in range(OUTPUTS)) * kept[j][i]
    return {
        "inputs.0.weight": [row[:INPUTS] for row in change],
        "recurrent.0.weight": [row[INPUTS:-1] for row in change],
        "inputs.0.bias": [row[-1] for row in change],
        "out.weight": [row[:-1] for row in of_out],
        "out.bias": [row[-1] for row in of_out],
    }


def build(model: nn.Module, **options: Any) -> bioopt.EProp:
    return bioopt.EProp(model, 0.1, seed=3, **SGD, **options)
