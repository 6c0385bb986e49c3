"""Pattern generation: a recurrent network learns to draw curves, by e-prop and by backpropagation through time."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bioopt.costs import Cost
from bioopt.nn import LeakyRate

from ..learner import Block, Learner
from ..models import RecurrentLayer
from . import pattern_generation_plots
from .side_by_side import SideBySide, learning_in_time

GROUPS = 5  # of input neurons, each active in its own part of the time
PER_GROUP = 4
EVERY = 2  # time steps between two spikes of an active input neuron


class Network(nn.Module):
    """A recurrent layer, and a leaky linear readout at each time step."""

    def __init__(self, hidden: int, outputs: int, neurons: str, tau_readout: float, **options: float) -> None:
        super().__init__()
        self.layer = RecurrentLayer(GROUPS * PER_GROUP, hidden, neurons, **options)
        self.readout = nn.Linear(hidden, outputs)
        self.leak = LeakyRate(tau_readout, None)

    def forward(self, xs: Tensor) -> Tensor:
        """From input spikes, steps × trials × inputs, to curves, trials × (steps · outputs)."""
        ys, state = [], None
        for current in self.readout(self.layer(xs)):
            y, state = self.leak(current, state)
            ys.append(y)
        return torch.stack(ys, 1).flatten(1)


class Curves(Cost):
    """The mean squared distance to the curves; targets are of the shape of the outputs."""

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N numbers."""
        assert targets is not None
        return (outputs - targets).square().mean(1)


@dataclass(eq=False)
class PatternGeneration(SideBySide):
    """Draw curves in time, sums of sines with random phases, for an input that only tells which part of them is next.

    All networks start from the same weights: e-prop with symmetric and random feedback, backpropagation through time,
    and a recurrent layer that does not learn (``frozen``). The number is the normalised mean squared error: 1 for a
    constant at the mean of the curve. The task of Bellec et al. (2020).
    """

    known = ("eprop", "random", "bptt", "frozen")

    _: KW_ONLY
    time: int  # time steps
    cycles: list[float]  # of each sine in this time
    outputs: int  # curves
    hidden: int  # neurons of the recurrent layer
    neurons: str  # as of `RecurrentLayer`
    tau: float  # as of `RecurrentLayer`, in time steps
    tau_adaptation: float  # as of `RecurrentLayer`
    beta: float  # as of `RecurrentLayer`
    gain: float  # as of `RecurrentLayer`
    tau_readout: float  # of the readout's leak, in time steps
    lr: dict[str, float]  # of Adam, of each learner, or `default`
    steps: int  # of a round

    def check(self) -> None:
        """Raise for options that are out of range."""
        self.require_counts("outputs", "hidden", "steps", "rounds")
        self.require_counts("time", least=GROUPS)
        if not self.cycles or min(self.cycles) <= 0:
            raise ValueError(f"task.cycles={self.cycles} must be numbers > 0, the cycles of each sine, such as [1,2,3]")
        t = torch.arange(self.time, dtype=torch.float64)
        active = t.mul(GROUPS / self.time).long()
        spikes = (active.unsqueeze(1) == torch.arange(GROUPS)) & (t % EVERY == 0).unsqueeze(1)
        self.spikes = spikes.float().repeat_interleave(PER_GROUP, 1).unsqueeze(1).to(self.device)
        phases = 2 * math.pi * torch.rand(len(self.cycles), self.outputs, dtype=torch.float64)
        sizes = 0.5 + 1.5 * torch.rand(len(self.cycles), self.outputs, dtype=torch.float64)
        turns = 2 * math.pi * torch.outer(t / self.time, torch.tensor(self.cycles, dtype=torch.float64))
        curves = (sizes * torch.sin(turns.unsqueeze(2) + phases)).sum(1)
        curves = (curves - curves.mean(0)) / curves.std(0, correction=0)  # a constant at the mean has an error of 1
        self.target = curves.float().flatten().unsqueeze(0).to(self.device)

    def learner(self, name: str) -> Learner:
        """One network with its optimizer."""
        options = {"tau": self.tau, "tau_adaptation": self.tau_adaptation, "beta": self.beta, "gain": self.gain}
        network = Network(self.hidden, self.outputs, self.neurons, self.tau_readout, **options).to(self.device)
        lr = self.lr.get(name, self.lr["default"])
        optimizer = learning_in_time(name, network, network.layer, lr, self.config.seed)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps * self.rounds)
        block = Block(network, Curves(), optimizer, scheduler)
        return Learner(network, [block], name=name, rate=f"task.lr.{name}={lr}")

    def round(self, number: int) -> dict[str, Any]:
        """Train each network on the curves, and measure its error."""
        line: dict[str, Any] = {"steps": number * self.steps}
        for name, learner in self.made.items():
            learner.moment = f"round {number}"
            learner.fit([(self.spikes, self.target)] * self.steps)
            line[name] = (self.drawn(learner) - self.target).square().mean().item()
        return line

    def drawn(self, learner: Learner) -> Tensor:
        """The curves of a network, 1 × (time · outputs)."""
        outputs, _ = learner.predict([(self.spikes, self.target)])
        return outputs

    def shown(self, line: dict[str, Any]) -> str:
        """The errors."""
        return "   ".join(f"{name} {line[name]:.4f}" for name in self.learners)

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The normalised mean squared error of each network after the last round."""
        found = {name: history[-1][name] for name in self.learners}
        shape = (self.time, self.outputs)
        curves = {name: self.drawn(learner).view(shape) for name, learner in self.made.items()}
        return found, [
            pattern_generation_plots.errors(self, history, title, folder / "error.png"),
            pattern_generation_plots.patterns(curves, self.target.view(shape), title, folder / "patterns.png"),
        ]
