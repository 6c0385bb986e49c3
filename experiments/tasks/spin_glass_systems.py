"""The systems of `spin_glass`: binary units at several temperatures, which exchange their states."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bioopt.nn import RBM

from ..likelihood import drawn


class Tempered(ABC):
    """Replicas of a system of binary units at several temperatures, which neighbours in temperature exchange.

    Exchanges (K. Hukushima & K. Nemoto, 1996, *Exchange Monte Carlo method and application to spin glass simulations*)
    let a state that is stuck in a valley climb out of it at a higher temperature. States are systems × temperatures ×
    replicas, and only replicas of different columns are independent of each other.

    Args:
        temperatures: rising.
        units: by which energies are divided.
    """

    def __init__(self, temperatures: Tensor, units: int) -> None:
        self.temperatures, self.units = temperatures, units
        self.bins = torch.linspace(-1, 1, 82, device=temperatures.device)
        self.moments = 0
        self.sums: dict[str, Tensor] = {}

    @abstractmethod
    def sweep(self) -> None:
        """Every unit once, by its conditional probability."""

    @abstractmethod
    def energy(self) -> Tensor:
        """Of each state, systems × temperatures × replicas."""

    @abstractmethod
    def overlaps(self) -> Tensor:
        """Of pairs of independent states, systems × temperatures × pairs."""

    @abstractmethod
    def rearrange(self, order: Tensor) -> None:
        """Give each temperature the state that another has had: ``order``, systems × temperatures × replicas."""

    def run(self, sweeps: int, measured: bool) -> None:
        """Sweep this many times, each with exchanges; measure after every fifth sweep."""
        for i in range(sweeps):
            self.sweep()
            self._exchange(i % 2)
            if measured and i % 5 == 4:
                self._measure()

    def _exchange(self, first: int) -> None:
        energy, count = self.energy(), len(self.temperatures)
        cold = torch.arange(first, count - 1, 2, device=energy.device)
        cooler = 1 / self.temperatures[cold] - 1 / self.temperatures[cold + 1]
        gain = cooler.view(1, -1, 1) * (energy[:, cold] - energy[:, cold + 1])
        swap = torch.rand_like(gain).log() < gain
        order = torch.arange(count, device=energy.device).view(1, -1, 1).expand_as(energy).clone()
        order[:, cold] += swap.long()
        order[:, cold + 1] -= swap.long()
        self.rearrange(order)

    def _measure(self) -> None:
        energy, q = self.energy() / self.units, self.overlaps()
        which = torch.bucketize(q.clamp(-1, 1), self.bins[1:-1])
        histogram = torch.stack([F.one_hot(w.flatten(), len(self.bins) - 1).sum(0) for w in which.unbind(1)])
        found = {
            "energy": energy.mean((0, 2)),
            "overlap": q.abs().mean((0, 2)),
            "squared": q.square().mean((0, 2)),
            "histogram": histogram / histogram.sum(1, keepdim=True),
        }
        self.sums = {name: value.double() + self.sums.get(name, 0) for name, value in found.items()}
        self.moments += 1

    def mean(self, name: str) -> Tensor:
        """The mean of a measured quantity at each temperature."""
        return (self.sums[name] / self.moments).cpu()

    def measurements(self) -> dict[str, Any]:
        """The state of the measurements."""
        return {"moments": self.moments, "sums": self.sums}

    def restore(self, measurements: dict[str, Any]) -> None:
        """Restore what `measurements` returned."""
        self.moments, self.sums = measurements["moments"], measurements["sums"]


class SpinGlass(Tempered):
    r"""Samples of the Sherrington-Kirkpatrick model, two replicas of each.

    :math:`E(s) = -\frac12 \sum_{i \ne j} J_{ij} s_i s_j` with spins :math:`s_i = \pm 1` and couplings :math:`J_{ij} =
    J_{ji}`, normal, of mean 0 and variance :math:`1/N` (D. Sherrington & S. Kirkpatrick, 1975, *Solvable model of a
    spin-glass*).
    """

    def __init__(self, spins: int, samples: int, temperatures: Tensor) -> None:
        super().__init__(temperatures, spins)
        upper = torch.randn(samples, spins, spins, device=temperatures.device).triu(1) / math.sqrt(spins)
        self.couplings = upper + upper.mT
        self.states = torch.randint(0, 2, (samples, len(temperatures), 2, spins), device=temperatures.device) * 2.0 - 1
        self.lowest = torch.zeros(samples, device=temperatures.device)  # energy that has been seen

    def sweep(self) -> None:
        """Heat bath, a spin at a time in all states at once."""
        s = self.states.flatten(1, 2)
        fields = s @ self.couplings
        # s_i = 1 with probability σ(2 f_i / T), that is where the field exceeds T/2 times a logistic random number.
        half = (self.temperatures / 2).repeat_interleave(2)
        least = torch.rand(s.shape[2], *s.shape[:2], device=s.device).logit_(eps=1e-7) * half
        for i in range(s.shape[2]):
            new = torch.where(fields[:, :, i] > least[i], 1.0, -1.0)
            change = (new - s[:, :, i]).unsqueeze(2)
            fields.baddbmm_(change, self.couplings[:, i : i + 1])
            s[:, :, i] = new
        self.states = s.view_as(self.states)
        self.lowest = torch.minimum(self.lowest, self.energy().flatten(1).amin(1))

    def energy(self) -> Tensor:
        """``E``."""
        s = self.states.flatten(1, 2)
        return (-(s @ self.couplings * s).sum(2) / 2).view(self.states.shape[:3])

    def overlaps(self) -> Tensor:
        """``q = Σ s s' / N`` of the two replicas."""
        return self.states.prod(2).mean(-1, keepdim=True)

    def rearrange(self, order: Tensor) -> None:
        """As of `Tempered`."""
        self.states = self.states.gather(1, order.unsqueeze(3).expand_as(self.states))

    def ground_states(self) -> Tensor:
        """Energy per spin of each sample's lowest state: the lowest seen, or reached from the last ones by descent."""
        s = self.states.flatten(1, 2).clone()
        fields = s @ self.couplings
        for _ in range(s.shape[2]):
            gain, which = (s * fields).min(2)  # below 0: this spin stands against its field
            if not (gain < 0).any():
                break
            flip = torch.where(gain < 0, -2 * s.gather(2, which.unsqueeze(2)).squeeze(2), 0.0)
            s.scatter_add_(2, which.unsqueeze(2), flip.unsqueeze(2))
            rows = self.couplings.gather(1, which.unsqueeze(2).expand(-1, -1, s.shape[2]))
            fields += flip.unsqueeze(2) * rows
        quenched = (-(s @ self.couplings * s).sum(2) / 2).amin(1)
        return torch.minimum(self.lowest, quenched) / self.units


class MachineSamples(Tempered):
    """Samples of an RBM at temperatures ``T``, with probabilities in proportion to ``exp(-E / T)``; its own is 1.

    Overlaps are correlations of two visible states, where each unit is taken from its mean ``centre``.
    """

    def __init__(self, rbm: RBM, centre: Tensor, replicas: int, temperatures: Tensor) -> None:
        super().__init__(temperatures, sum(rbm.weight.shape))
        self.rbm, self.centre = rbm, centre
        shape = (1, len(temperatures), replicas)
        self.states = torch.randint(0, 2, (*shape, rbm.weight.shape[1]), device=centre.device).float()
        self.hidden = torch.zeros(*shape, rbm.weight.shape[0], device=centre.device)

    @torch.no_grad()
    def sweep(self) -> None:
        """All hidden units, then all visible ones."""
        t = self.temperatures.view(1, -1, 1, 1)
        weight, bias = self.rbm.weight, self.rbm.synapse.bias
        self.hidden = drawn(F.linear(self.states, weight, bias) / t)
        self.states = drawn(F.linear(self.hidden, weight.T, self.rbm.visible_bias) / t)

    @torch.no_grad()
    def energy(self) -> Tensor:
        """``E(v, h)``."""
        u = F.linear(self.states, self.rbm.weight, self.rbm.synapse.bias)
        return -(u * self.hidden).sum(-1) - self.states @ self.rbm.visible_bias

    def overlaps(self) -> Tensor:
        """The correlations of all pairs of replicas."""
        return pair_overlaps(self.states, self.centre)

    def rearrange(self, order: Tensor) -> None:
        """As of `Tempered`."""
        self.states, self.hidden = (x.gather(1, order.unsqueeze(3).expand_as(x)) for x in (self.states, self.hidden))


def pair_overlaps(states: Tensor, centre: Tensor) -> Tensor:
    """Correlations of all pairs along the last dimension but one of … × states × units, … × pairs."""
    away = F.normalize(states - centre, dim=-1)
    first, second = torch.triu_indices(states.shape[-2], states.shape[-2], 1, device=states.device)
    return (away @ away.mT)[..., first, second]
