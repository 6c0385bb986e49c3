"""Energies and overlaps of a spin glass, whose couplings are random, and of a Boltzmann machine, which has learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

import bioopt
from bioopt.nn import RBM

from .. import data
from ..likelihood import drawn
from ..models import ToUnitInterval
from ..verdict import Expected
from . import Task, spin_glass_plots


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


@dataclass(eq=False)
class Valleys(Task):
    """``experiment=spin_glass``: a glass whose couplings are random, and a machine whose couplings have learned.

    In the first half of the rounds the glass reaches equilibrium, and the machine learns from handwritten digits, while
    its samples follow; in the second half both are measured.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    spins: int  # of a glass
    samples: int  # glasses, each with couplings of its own
    sweeps: int  # of all spins, in a round
    coldest: float  # temperature of a glass; temperatures rise in equal ratios, through 1, where the glass melts
    hottest: float  # the highest, of both systems
    temperatures: int  # their number
    rounds: int  # an even number
    hidden: int  # units of the machine
    lr: float  # of the machine
    epochs: int  # of its learning, in a round
    replicas: int  # of the machine

    def __post_init__(self) -> None:
        self.require_counts("samples", "epochs")
        self.require_counts("spins", "rounds", "replicas", least=2)
        self.require_counts("temperatures", least=3)
        self.require_counts("sweeps", least=10)
        if self.rounds % 2:
            raise ValueError(f"task.rounds={self.rounds} must be even: in the first half nothing is measured")
        if not 0 < self.coldest < 1 < self.hottest:
            raise ValueError(
                f"task.coldest={self.coldest} and task.hottest={self.hottest} must lie on either side of 1, above 0"
            )
        ladder = torch.logspace(
            math.log10(self.coldest), math.log10(self.hottest), self.temperatures, device=self.device
        )
        self.glass = SpinGlass(self.spins, self.samples, ladder)
        self.images = data.load("digits", self.config.data.root, self.device)
        grey = ToUnitInterval()
        self.grey = grey(self.images.prepare(self.images.train_images)).flatten(1)
        self.rbm = RBM(self.grey.shape[1], self.hidden).to(self.device)
        mean = (self.grey.sum(0) + 1) / (len(self.grey) + 2)
        # Without hidden units, the visible ones then have the data's mean (Hinton, 2010). Biases of 0 would leave it to
        # the hidden units, and noise, with few of them active, would become a phase that no persistent chain visits.
        self.rbm.visible_bias.data.copy_(torch.logit(mean))
        self.optimizer = bioopt.ContrastiveDivergence(self.rbm, self.lr, persistent=True, seed=self.config.seed)
        warm = torch.logspace(math.log10(0.3), math.log10(self.hottest), self.temperatures, device=self.device)
        warm[(warm.log().abs()).argmin()] = 1.0
        self.machine = MachineSamples(self.rbm, self.grey.mean(0), self.replicas, warm)

    def round(self, number: int) -> dict[str, Any]:
        """Equilibrium and learning, or measurements."""
        measured = number > self.rounds // 2
        if not measured:
            for epoch in range(self.epochs):
                self._learn(1 - ((number - 1) * self.epochs + epoch) / (self.epochs * self.rounds / 2))
        self.glass.run(self.sweeps, measured)
        self.machine.run(self.sweeps, measured)
        found = {
            "glass_energy": (self.glass.energy()[:, 0].mean() / self.glass.units).item(),
            "glass_overlap": self.glass.overlaps()[:, 0].abs().mean().item(),
            "machine_energy": (self.machine.energy()[:, self.own].mean() / self.machine.units).item(),
            "machine_overlap": self.machine.overlaps()[:, self.own].mean().item(),
        }
        return {"stage": "measure" if measured else "settle", **found}

    @property
    def own(self) -> int:
        """The index of the machine's temperature 1."""
        return int((self.machine.temperatures - 1).abs().argmin())

    def _learn(self, share: float) -> None:
        for batch in torch.split(torch.randperm(len(self.grey), device=self.grey.device), 20):
            self.rbm(torch.bernoulli(self.grey[batch]))
            self.optimizer.estimate()
            for p in self.rbm.parameters():
                assert p.grad is not None
                p.grad.mul_(share)  # a rate that falls to 0
            self.optimizer.descend()

    def state_dict(self) -> dict[str, Any]:
        """Couplings, states, weights, chains and measurements."""
        return {
            "couplings": self.glass.couplings, "spins": self.glass.states, "lowest": self.glass.lowest,
            "rbm": self.rbm.state_dict(), "optimizer": self.optimizer.state_dict(), "visible": self.machine.states,
            "hidden": self.machine.hidden,
            "measured": [self.glass.measurements(), self.machine.measurements()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.glass.couplings, self.glass.states, self.glass.lowest = (
            state[name] for name in ("couplings", "spins", "lowest")
        )
        self.rbm.load_state_dict(state["rbm"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.machine.states, self.machine.hidden = state["visible"], state["hidden"]
        for system, measured in zip((self.glass, self.machine), state["measured"], strict=True):
            system.restore(measured)

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The energy of a ground state of so many spins."""
        return {"ground_state_energy": [Expected([summary["measured"]["ground_state_energy_of_theory"]], "by theory")]}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The numbers for which there is a theory, and the pictures."""
        glass, machine, ground = self.glass, self.machine, self.glass.ground_states()
        t, energy, squared = glass.temperatures.cpu().double(), glass.mean("energy"), glass.mean("squared")
        same, other = self._data_overlaps()
        own = self.own
        numbers = {
            "ground_state_energy": ground.mean().item(),
            "ground_state_energy_standard_error": (ground.std() / math.sqrt(len(ground))).item()
            if len(ground) > 1
            else 0,
            "ground_state_energy_of_theory": -0.763 + 0.70 * glass.units ** (-2 / 3),
            "coldest_mean_absolute_overlap": glass.mean("overlap")[0].item(),
            "hottest_mean_absolute_overlap": glass.mean("overlap")[-1].item(),
            # In equilibrium, and averaged over couplings, e = -(1 - ⟨q²⟩) / 2T, for any N.
            "coldest_mean_squared_overlap": squared[0].item(),
            "coldest_mean_squared_overlap_by_energy": (1 + 2 * t * energy)[0].item(),
            "largest_energy_gap_by_overlap_above_half": (energy + (1 - squared) / (2 * t))[t > 0.5].abs().max().item(),
            "machine_overlap_of_samples": self._mean_overlap(machine.mean("histogram")[own]),
            "digits_overlap_within_a_class": same.mean().item(),
            "digits_overlap_between_classes": other.mean().item(),
        }
        return numbers, [
            spin_glass_plots.four_panels(self, title, same, other, folder),
            spin_glass_plots.by_temperature(self, title, folder),
        ]

    def _mean_overlap(self, histogram: Tensor) -> float:
        return (histogram * self.middles()).sum().item()

    def middles(self) -> Tensor:
        """The centres of the bins of overlaps."""
        bins = self.machine.bins.cpu()
        return (bins[1:] + bins[:-1]) / 2

    def _data_overlaps(self) -> tuple[Tensor, Tensor]:
        """Of binary digits, of one class and of two."""
        v, labels = torch.bernoulli(self.grey[:500]), self.images.train_labels[:500]
        q = pair_overlaps(v, self.machine.centre)
        first, second = torch.triu_indices(len(v), len(v), 1, device=v.device)
        same = labels[first] == labels[second]
        return q[same].cpu(), q[~same].cpu()
