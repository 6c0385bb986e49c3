"""Energies and overlaps of a spin glass, whose couplings are random, and of a Boltzmann machine, which has learned."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

import bioopt
from bioopt.nn import RBM

from .. import data
from ..models import Grey
from . import Task, spin_glass_plots
from .spin_glass_systems import MachineSamples, SpinGlass, pair_overlaps


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
        grey = Grey()
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
        alike = labels[first] == labels[second]
        return q[alike].cpu(), q[~alike].cpu()
