"""What a Boltzmann machine has learned: its likelihood and its dreams; and a spin glass, its ancestor, beside it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt.nn import RBM
from bioopt.nn.rbm import bernoulli

from . import data
from .models import ToUnitInterval
from .options import require_counts
from .pictures import saved, uncluttered
from .tasks import Task

GROUND_STATE = -0.7632  # of the Sherrington-Kirkpatrick model, energy per spin (Parisi, 1979)


# -- likelihood -------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_partition(
    rbm: RBM, base: Tensor, inverse_temperatures: Tensor, chains: int, generator: torch.Generator
) -> tuple[float, float]:
    r"""``log Z`` of a machine by annealed importance sampling, and its standard error.

    Chains go from a machine without weights, whose visible units are on with the probabilities ``base``, through
    :math:`p_\beta(v) \propto p_0(v)^{1-\beta} p(v)^\beta` to the machine itself (R. Salakhutdinov & I. Murray, 2008,
    *On the quantitative analysis of deep belief networks*, whose base-rate machine and transitions these are).

    Args:
        rbm: the machine.
        base: probabilities of the visible units, between 0 and 1.
        inverse_temperatures: :math:`\beta` rising from 0 to 1.
        chains: how many independent runs.
        generator: of the draws.
    """
    weight, hidden, visible = rbm.synapse.weight, rbm.synapse.bias, rbm.visible_bias
    bias = torch.logit(base)
    v = bernoulli(base.expand(chains, -1), generator)
    log_weights = torch.zeros(chains, dtype=torch.float64, device=base.device)
    betas = inverse_temperatures.tolist()
    for colder, beta in pairwise(betas):
        u = F.linear(v, weight, hidden)
        # log p*_β(v) - log p*_β'(v); hidden units without weights count alike in both
        log_weights += (beta - colder) * (v @ (visible - bias)) + (F.softplus(beta * u) - F.softplus(colder * u)).sum(1)
        h = _drawn(beta * u, generator)
        v = _drawn((1 - beta) * bias + beta * F.linear(h, weight.T, visible), generator)
    log_base = F.softplus(bias.double()).sum() + len(hidden) * math.log(2)
    log_mean = log_weights.logsumexp(0) - math.log(chains)
    relative = (log_weights - log_mean).exp()  # of mean 1
    return (log_base + log_mean).item(), (relative.std() / math.sqrt(chains)).item()


def _drawn(log_odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return bernoulli(torch.sigmoid(log_odds), generator)


def published_temperatures(device: torch.device) -> Tensor:
    """The 14,500 inverse temperatures of Salakhutdinov & Murray (2008)."""
    parts = [(0.0, 0.5, 500), (0.5, 0.9, 4000), (0.9, 1.0, 10_000)]
    steps = [torch.linspace(a, b, count + 1, dtype=torch.float64)[:-1] for a, b, count in parts]
    return torch.cat([*steps, torch.ones(1, dtype=torch.float64)]).to(device)


@torch.no_grad()
def likelihood(
    model: nn.Module, images: data.Images, title: str, folder: Path, *, chains: int, dream: int, seed: int
) -> tuple[dict[str, Any], list[Path]]:
    """The log-likelihood of the first machine in a sequential model, in nats an image, and what it dreams.

    Images are made binary as in its training: each pixel is 1 with its grey level as the probability, once for all,
    by ``seed``. The standard error has that of ``log Z`` and that of the mean over test images in it.

    Args:
        model: with what makes grey levels of images, and an RBM on them.
        images: the data.
        title: of the run.
        folder: where to write.
        chains: of annealed importance sampling.
        dream: Gibbs steps from noise to the samples that are shown.
        seed: of all draws.
    """
    model.eval()
    generator = torch.Generator(images.test_labels.device).manual_seed(seed)
    before, rbm = _first_machine(model)

    def binary(some: Tensor) -> Tensor:
        grey = torch.cat([before(images.prepare(part)) for part in torch.split(some, 1000)])
        return bernoulli(grey, generator)

    test = binary(images.test_images)
    train = binary(images.train_images[: len(test)])
    base = (train.sum(0) + 1) / (len(train) + 2)  # no pixel is certain
    temperatures = published_temperatures(base.device)
    log_z, error = log_partition(rbm, base, temperatures, chains, generator)
    log_p, log_p_train = (-rbm.free_energy(v).double() - log_z for v in (test, train))
    numbers = {
        "log_likelihood": log_p.mean().item(),
        "log_likelihood_standard_error": math.hypot(error, log_p.std().item() / math.sqrt(len(test))),
        "train_log_likelihood": log_p_train.mean().item(),
        "log_z": log_z,
        "log_z_standard_error": error,
    }
    noise = (torch.rand(100, test.shape[1], generator=generator, device=base.device) < 0.5).float()
    dreamt = rbm.visible_given(rbm.sample_hidden(rbm.gibbs(noise, dream - 1, generator), generator))
    print(
        f"log-likelihood of the test images {numbers['log_likelihood']:.2f} ± "
        f"{numbers['log_likelihood_standard_error']:.2f} nats (training images {log_p_train.mean():.2f})",
        flush=True,
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, shown, name in (
        (left, test[:100], "test images, each pixel tossed"),
        (right, dreamt, f"samples after {dream:,} Gibbs steps from noise"),
    ):
        axes.imshow(mosaic(shown, images.shape, 10), cmap="Greys", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    return numbers, [saved(figure, folder / "samples.png")]


def _first_machine(model: nn.Module) -> tuple[nn.Sequential, RBM]:
    for i, layer in enumerate(model.children()):
        if isinstance(layer, RBM) and isinstance(model, nn.Sequential):
            return model[:i], layer
    raise ValueError("afterwards=likelihood needs a sequential model with an RBM in it: model=rbm")


def mosaic(images: Tensor, shape: tuple[int, int, int], columns: int) -> Any:
    """Images N×pixels as one, row by row, with a margin around each; colours are averaged."""
    tiles = F.pad(images.reshape(-1, *shape).float().mean(1), (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(row), 1) for row in tiles.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[1] - rows[-1].shape[1]))
    return torch.cat(rows).cpu().numpy()


# -- spin glass -------------------------------------------------------------------------------------------------


class Tempered(ABC):
    """Replicas of a system of binary units at several temperatures, which neighbours in temperature exchange.

    Exchanges (K. Hukushima & K. Nemoto, 1996, *Exchange Monte Carlo method and application to spin glass simulations*)
    let what is stuck in a valley climb out of it at a higher temperature. States are systems × temperatures × replicas,
    and only replicas of different columns are independent of each other.

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
        """So many sweeps, each with exchanges; a measurement after every fifth."""
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
        """Of a measured quantity, for each temperature."""
        return (self.sums[name] / self.moments).cpu()

    def measurements(self) -> dict[str, Any]:
        """State, to be saved."""
        return {"moments": self.moments, "sums": self.sums}

    def restore(self, measurements: dict[str, Any]) -> None:
        """The inverse of `measurements`."""
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
        """Energy per spin of each sample's lowest state: the lowest seen, or below one that stands at last."""
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


class Dreams(Tempered):
    """Samples of an RBM at temperatures ``T``, with probabilities of ``exp(-E / T)``; its own is 1.

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
        self.hidden = _drawn(F.linear(self.states, weight, bias) / t)
        self.states = _drawn(F.linear(self.hidden, weight.T, self.rbm.visible_bias) / t)

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


class Valleys(Task):
    """``experiment=spin_glass``: a glass whose couplings are random, and a machine whose couplings have learned.

    In the first half of the rounds the glass comes to equilibrium, and the machine learns from handwritten digits,
    while its samples follow; in the second half both are measured.

    Args:
        config: of the run.
        device: where to compute.
        spins: of a glass.
        samples: glasses, each with couplings of its own.
        sweeps: of all spins, in a round.
        coldest: temperature of a glass; temperatures rise in equal ratios, through 1, where the glass melts.
        hottest: the highest, of both systems.
        temperatures: how many.
        rounds: an even number.
        hidden: units of the machine.
        lr: of the machine.
        epochs: of its learning, in a round.
        replicas: of the machine.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        *,
        spins: int,
        samples: int,
        sweeps: int,
        coldest: float,
        hottest: float,
        temperatures: int,
        rounds: int,
        hidden: int,
        lr: float,
        epochs: int,
        replicas: int,
    ) -> None:
        require_counts(samples=samples, epochs=epochs)
        require_counts(2, spins=spins, rounds=rounds, replicas=replicas)
        require_counts(3, temperatures=temperatures)
        require_counts(10, sweeps=sweeps)
        if rounds % 2:
            raise ValueError(f"task.rounds={rounds} must be even: in the first half nothing is measured")
        if not 0 < coldest < 1 < hottest:
            raise ValueError(f"task.coldest={coldest} and task.hottest={hottest} must lie on either side of 1, above 0")
        self.rounds, self.sweeps, self.epochs = rounds, sweeps, epochs
        ladder = torch.logspace(math.log10(coldest), math.log10(hottest), temperatures, device=device)
        self.glass = SpinGlass(spins, samples, ladder)
        self.images = data.load("digits", config.data.root, device)
        grey = ToUnitInterval()
        self.grey = grey(self.images.prepare(self.images.train_images)).flatten(1)
        self.rbm = RBM(self.grey.shape[1], hidden).to(device)
        mean = (self.grey.sum(0) + 1) / (len(self.grey) + 2)
        # As if alone, the visible units have the data's mean (Hinton, 2010). From 0, they owe it to the hidden units,
        # and noise, where few of these are active, becomes a phase of its own that no persistent chain ever visits.
        self.rbm.visible_bias.data.copy_(torch.logit(mean))
        self.optimizer = bioopt.ContrastiveDivergence(self.rbm, lr, persistent=True, seed=config.seed)
        warm = torch.logspace(math.log10(0.3), math.log10(hottest), temperatures, device=device)
        warm[(warm.log().abs()).argmin()] = 1.0
        self.dreams = Dreams(self.rbm, self.grey.mean(0), replicas, warm)

    def round(self, number: int) -> dict[str, Any]:
        """Equilibrium and learning, or measurements."""
        measured = number > self.rounds // 2
        if not measured:
            for epoch in range(self.epochs):
                self._learn(1 - ((number - 1) * self.epochs + epoch) / (self.epochs * self.rounds / 2))
        self.glass.run(self.sweeps, measured)
        self.dreams.run(self.sweeps, measured)
        said = {
            "glass_energy": (self.glass.energy()[:, 0].mean() / self.glass.units).item(),
            "glass_overlap": self.glass.overlaps()[:, 0].abs().mean().item(),
            "machine_energy": (self.dreams.energy()[:, self._own].mean() / self.dreams.units).item(),
            "machine_overlap": self.dreams.overlaps()[:, self._own].mean().item(),
        }
        return {"stage": "measure" if measured else "settle", **said}

    @property
    def _own(self) -> int:
        """Which of the machine's temperatures is 1."""
        return int((self.dreams.temperatures - 1).abs().argmin())

    def _learn(self, share: float) -> None:
        for batch in torch.split(torch.randperm(len(self.grey), device=self.grey.device), 20):
            self.rbm(torch.bernoulli(self.grey[batch]))
            self.optimizer.estimate()
            for p in self.rbm.parameters():
                assert p.grad is not None
                p.grad.mul_(share)  # a rate that falls to 0
            self.optimizer.descend()

    def state_dict(self) -> dict[str, Any]:
        """Couplings, states, weights, chains and what has been measured."""
        return {
            "couplings": self.glass.couplings, "spins": self.glass.states, "lowest": self.glass.lowest,
            "rbm": self.rbm.state_dict(), "optimizer": self.optimizer.state_dict(), "visible": self.dreams.states,
            "hidden": self.dreams.hidden,
            "measured": [self.glass.measurements(), self.dreams.measurements()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `state_dict` has it."""
        self.glass.couplings, self.glass.states, self.glass.lowest = (
            state[name] for name in ("couplings", "spins", "lowest")
        )
        self.rbm.load_state_dict(state["rbm"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dreams.states, self.dreams.hidden = state["visible"], state["hidden"]
        for system, measured in zip((self.glass, self.dreams), state["measured"], strict=True):
            system.restore(measured)

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The numbers that theory has something to say of, and the picture."""
        glass, dreams, ground = self.glass, self.dreams, self.glass.ground_states()
        t, energy, squared = glass.temperatures.cpu().double(), glass.mean("energy"), glass.mean("squared")
        same, other = self._data_overlaps()
        own = self._own
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
            "machine_overlap_of_samples": self._mean_overlap(dreams.mean("histogram")[own]),
            "digits_overlap_within_a_class": same.mean().item(),
            "digits_overlap_between_classes": other.mean().item(),
        }
        return numbers, [self._four_panels(title, same, other, folder), self._by_temperature(title, folder)]

    def _mean_overlap(self, histogram: Tensor) -> float:
        return (histogram * self._middles()).sum().item()

    def _middles(self) -> Tensor:
        bins = self.dreams.bins.cpu()
        return (bins[1:] + bins[:-1]) / 2

    def _data_overlaps(self) -> tuple[Tensor, Tensor]:
        """Of binary digits, of one class and of two."""
        v, labels = torch.bernoulli(self.grey[:500]), self.images.train_labels[:500]
        q = pair_overlaps(v, self.dreams.centre)
        first, second = torch.triu_indices(len(v), len(v), 1, device=v.device)
        alike = labels[first] == labels[second]
        return q[alike].cpu(), q[~alike].cpu()

    def _four_panels(self, title: str, same: Tensor, other: Tensor, folder: Path) -> Path:
        figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
        figure.suptitle(title, fontsize=10)
        glass, dreams, middles = self.glass, self.dreams, self._middles()
        density = len(middles) / 2
        t = glass.temperatures.cpu()
        axes = grid[0][0]
        axes.plot(t, glass.mean("energy"), marker="o", markersize=4, label="measured")
        warm = torch.linspace(1, float(t[-1]), 50)
        axes.plot(warm, -1 / (2 * warm), color="black", linewidth=1, label="theory, −1/(2T) for T > 1")
        axes.axhline(GROUND_STATE, color="grey", linestyle="--", linewidth=1, label=f"ground state, {GROUND_STATE}")
        axes.set(xlabel="temperature T", ylabel="energy per spin", title=f"Spin glass, N = {glass.units}")
        axes = grid[0][1]
        for i in _spread(len(t)):
            axes.plot(middles, glass.mean("histogram")[i] * density, label=f"T = {t[i]:.2f}")
        axes.set(
            xticks=[-1, -0.5, 0, 0.5, 1],
            xlabel="overlap q of two replicas",
            ylabel="P(q)",
            title="Spin glass: many valleys, by chance",
        )
        t, own = dreams.temperatures.cpu(), self._own
        axes = grid[1][0]
        axes.plot(t, dreams.mean("energy"), marker="o", markersize=4, color="tab:orange", label="measured")
        axes.axvline(1, color="grey", linestyle="--", linewidth=1, label="T = 1, where it has learned")
        units = "×".join(str(n) for n in reversed(self.rbm.weight.shape))
        axes.set(xlabel="temperature T", ylabel="energy per unit", title=f"Boltzmann machine, {units}, digits")
        axes = grid[1][1]
        for i, colour in ((own, "tab:orange"), (len(t) - 1, "tab:red")):
            axes.plot(middles, dreams.mean("histogram")[i] * density, color=colour, label=f"samples, T = {t[i]:.2f}")
        for q, name, style in ((same, "digits of one class", "-"), (other, "digits of two classes", "--")):
            counts = torch.histc(q, len(middles), -1, 1)
            axes.plot(middles, counts / counts.sum() * density, color="grey", linestyle=style, label=name)
        axes.set(
            xlabel="overlap q of two samples", ylabel="P(q)", title="Boltzmann machine: valleys that mean something"
        )
        for row in grid:
            row[1].set_xticks([-1, -0.5, 0, 0.5, 1])
        for axes in grid.flat:
            uncluttered(axes)
            axes.legend(frameon=False, fontsize=8)
            axes.title.set_size(10)
        return saved(figure, folder / "spin_glass.png")

    def _by_temperature(self, title: str, folder: Path) -> Path:
        """Visible states of the machine, a row for each of some temperatures."""
        t = self.dreams.temperatures.cpu()
        rows = sorted({0, *_spread(len(t)), self._own})
        columns = min(16, self.dreams.states.shape[2])
        figure, grid = plt.subplots(
            len(rows), 1, figsize=(0.55 * columns + 0.9, 0.62 * len(rows) + 0.5), layout="constrained", squeeze=False
        )
        figure.suptitle(f"What the machine sees at temperature T: {title}", fontsize=9)
        for axes, i in zip(grid.flat, rows, strict=True):
            axes.imshow(mosaic(self.dreams.states[0, i, :columns], self.images.shape, columns), cmap="Greys")
            axes.set_ylabel(f"T = {t[i]:.2f}", rotation=0, ha="right", va="center", fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        return saved(figure, folder / "machine_by_temperature.png")


def _spread(count: int) -> Sequence[int]:
    """Four of so many, from first to last."""
    return sorted({round(i * (count - 1) / 3) for i in range(4)})
