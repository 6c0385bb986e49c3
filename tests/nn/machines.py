"""Boltzmann machines small enough to write out state by state."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import bioopt

VISIBLE, HIDDEN = 4, 3


def states(units: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)


def machine(seed: int = 0, visible: int = VISIBLE, hidden: int = HIDDEN) -> bioopt.nn.RBM:
    rbm = bioopt.nn.RBM(visible, hidden).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rbm.parameters():
            p.normal_(generator=generator)
    return rbm


def energies(rbm: bioopt.nn.RBM) -> Tensor:
    """Of all states, visible × hidden, a loop over units."""
    weight, visible_bias, hidden_bias = rbm.synapse.weight, rbm.visible_bias, rbm.synapse.bias
    rows = []
    for v in states(len(visible_bias)):
        row = []
        for h in states(len(hidden_bias)):
            energy = torch.zeros((), dtype=torch.float64)
            for i in range(len(v)):
                energy = energy - visible_bias[i] * v[i]
            for j in range(len(h)):
                energy = energy - hidden_bias[j] * h[j]
                for i in range(len(v)):
                    energy = energy - weight[j, i] * h[j] * v[i]
            row.append(energy)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def log_z(rbm: bioopt.nn.RBM) -> Tensor:
    return (-energies(rbm)).logsumexp((0, 1))


def log_likelihood(rbm: bioopt.nn.RBM, v: Tensor) -> Tensor:
    """``log p(v)`` of binary rows, from the table of all states."""
    table = (-energies(rbm)).logsumexp(1) - log_z(rbm)
    which = (v @ (2.0 ** torch.arange(v.shape[1] - 1, -1, -1, dtype=v.dtype))).long()
    return table[which]


def exact_samples(rbm: bioopt.nn.RBM, count: int, seed: int = 0) -> Tensor:
    with torch.no_grad():
        p = (-energies(rbm)).logsumexp(1).softmax(0)
    return states(VISIBLE)[torch.multinomial(p, count, True, generator=torch.Generator().manual_seed(seed))]


def exact_gradient(rbm: bioopt.nn.RBM, v: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*rbm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(log_likelihood(rbm, v).mean(), parameters), strict=True))


def data(count: int = 40, seed: int = 1, units: int = VISIBLE) -> Tensor:
    return (torch.rand(count, units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) < 0.3).double()
