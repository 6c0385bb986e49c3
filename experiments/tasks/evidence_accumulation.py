"""Evidence accumulation: which side had more cues, some time ago? e-prop beside backpropagation through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.costs import CrossEntropy
from bioopt.nn import LIF

from ..learner import Block, Learner
from ..models import RecurrentLayer
from ..verdict import Expected
from . import evidence_accumulation_plots
from .credit import cosine_per_step, cosines, states_of
from .side_by_side import SideBySide, learning_in_time

GROUPS = ("left", "right", "answer", "noise")  # of input neurons
PER_GROUP = 10


class Network(nn.Module):
    """A recurrent layer, and a readout that counts while the answer is asked for."""

    def __init__(self, hidden: int, neurons: str, answer: int, **options: float) -> None:
        super().__init__()
        self.layer = RecurrentLayer(len(GROUPS) * PER_GROUP, hidden, neurons, gain=0.5, **options)
        self.readout = nn.Linear(hidden, 2)
        self.answer = answer
        self.activity = torch.zeros(0)  # of the last pass, steps × batch × hidden

    def forward(self, xs: Tensor) -> Tensor:
        """From input spikes, steps × batch × inputs, to scores, batch × 2."""
        self.activity = self.layer(xs)
        scores: Tensor = self.readout(self.activity[-self.answer :]).mean(0)
        return scores

    def rates(self) -> Tensor:
        """The spikes of each neuron per time step, in the last pass."""
        return self.activity.mean((0, 1))


class QuietCrossEntropy(CrossEntropy):
    """Cross-entropy, and a penalty on the deviation of each neuron's rate from a target."""

    def __init__(self, rates: Callable[[], Tensor], strength: float, rate: float) -> None:
        super().__init__()
        self.rates, self.strength, self.rate = rates, strength, rate

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs."""
        return super().of_labels(outputs, labels) + self.strength * (self.rates() - self.rate).square().sum()


@dataclass(eq=False)
class EvidenceAccumulation(SideBySide):
    """Cues to the left and right, a delay, then the answer: the side that had more of them.

    Each cue makes the neurons of its side fire for some time steps; after a delay of random length the neurons of the
    answer fire, while the network must decide. All networks see the same trials, start from the same weights, and are
    tested on fresh trials after each round: e-prop with symmetric and with random feedback, backpropagation through
    time, e-prop without adaptive thresholds (``lif``), and a recurrent layer that does not learn (``frozen``).
    """

    known = ("eprop", "random", "bptt", "lif", "frozen")

    _: KW_ONLY
    cues: int  # of a trial, an odd number
    cue: int  # time steps of a cue
    pause: int  # time steps after it
    delay: Sequence[int]  # the least and the most time steps between the last pause and the answer
    answer: int  # time steps of the answer
    rate: float  # spikes per time step of an input neuron that is active
    noise: float  # of those that always fire
    hidden: int  # neurons of the recurrent layer
    tau: float  # of their membrane, in time steps
    tau_adaptation: float  # of their thresholds
    beta: float  # by which a spike raises the threshold, in half of them
    lr: dict[str, float]  # of Adam, of each learner, or `default`
    quiet: dict[str, float]  # `strength` of the penalty on rates, and the `rate` that they are to have
    batch_size: int
    steps: int  # of a round
    trials: int  # tested after each round

    def check(self) -> None:
        """Raise for options that are out of range."""
        self.require_counts("cues", "cue", "pause", "answer", "hidden", "batch_size", "steps", "rounds", "trials")
        if self.cues % 2 == 0:
            raise ValueError(f"task.cues={self.cues} must be odd, so that one side has more")
        if len(self.delay) != 2 or not 0 <= self.delay[0] <= self.delay[1]:
            raise ValueError(
                f"task.delay={list(self.delay)} must be the least and the most time steps, such as [30,60]"
            )

    def learner(self, name: str) -> Learner:
        """One network with its optimizer."""
        options = {"tau": self.tau, "tau_adaptation": self.tau_adaptation, "beta": self.beta}
        network = Network(self.hidden, "lif" if name == "lif" else "alif", self.answer, **options).to(self.device)
        lr = self.lr.get(name, self.lr["default"])
        optimizer = learning_in_time(name, network, network.layer, lr, self.config.seed)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps * self.rounds)
        block = Block(network, QuietCrossEntropy(network.rates, **self.quiet), optimizer, scheduler)
        return Learner(network, [block], name=name, rate=f"task.lr.{name}={lr}")

    def round(self, number: int) -> dict[str, Any]:
        """Train each network on the same trials, and test it on the same fresh ones."""
        training = [self.drawn(self.batch_size) for _ in range(self.steps)]
        tested = [self.drawn(min(self.trials, 256)) for _ in range(-(-self.trials // 256))]
        line: dict[str, Any] = {"steps": number * self.steps}
        for name, learner in self.made.items():
            learner.moment = f"round {number}"
            losses = torch.cat(learner.fit(training))
            scores, labels = learner.predict(tested)
            line[name] = (scores.argmax(1) == labels).double().mean().item()
            line[f"{name}_loss"] = losses.mean().item()
            line[f"{name}_rate"] = learner.network.rates().mean().item()  # type: ignore[operator]
            if isinstance(learner.last.optimizer, bioopt.EProp):
                inputs, sides = tested[0]
                learner.train()  # rules watch no evaluation
                few = learner.last.closure(inputs[:, : self.batch_size], sides[: self.batch_size])
                found = cosines(learner.last.optimizer, few, ("layer.enter.weight", "layer.recurrent.weight"))
                line |= {f"{name}_cosine_{layer.split('.')[1]}": value for layer, value in found.items()}
        return line

    def drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Fresh trials with one delay: input spikes, steps × trials × inputs, and the side with more cues."""
        delay = int(torch.randint(self.delay[0], self.delay[1] + 1, ()))
        likely = torch.where(torch.rand(count) < 0.5, 0.3, 0.7)  # that a cue is to the right
        right = (torch.rand(self.cues, count) < likely).long()
        period = self.cue + self.pause
        rates = torch.zeros(self.cues * period + delay + self.answer, count, len(GROUPS))
        for i, sides in enumerate(right):
            rates[i * period : i * period + self.cue, :, :2] = self.rate * F.one_hot(sides, 2)
        rates[-self.answer :, :, 2] = self.rate
        rates[:, :, 3] = self.noise
        spikes = torch.rand(*rates.shape[:2], len(GROUPS) * PER_GROUP) < rates.repeat_interleave(PER_GROUP, 2)
        return spikes.float().to(self.device), (right.sum(0) > self.cues // 2).long().to(self.device)

    def shown(self, line: dict[str, Any]) -> str:
        """The accuracies."""
        return "   ".join(f"{name} {100 * line[name]:.1f}%" for name in self.learners)

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """Chance."""
        return {name: [Expected([0.5], "by chance")] for name in self.learners}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Of each network, the accuracy after the last round, and the number of steps after which it first had 95 %."""
        found = {name: history[-1][name] for name in self.learners}
        for name in self.learners:
            reached = [line["steps"] for line in history if line[name] >= 0.95]
            if reached:
                found[f"{name}_steps_to_95"] = reached[0]
        pictures = [evidence_accumulation_plots.curves(self, history, title, folder / "accuracy.png")]
        inputs, sides = self.drawn(self.batch_size)
        over_time = {
            name: cosine_per_step(one.network, one.last.optimizer, one.network.layer.enter, inputs, sides)  # type: ignore[union-attr, arg-type]
            for name, one in self.made.items()
            if isinstance(one.last.optimizer, bioopt.EProp)
        }
        if over_time:
            path = folder / "credit.png"
            pictures.append(evidence_accumulation_plots.credit(self, history, over_time, title, path))
        shown = next(iter(self.made.values()))
        spikes, labels = inputs[:, :1], sides[:1]
        with states_of(shown.network.layer.neurons) as states:  # type: ignore[union-attr, arg-type]
            scores, _ = shown.predict([(spikes, labels)])
        activity = shown.network.activity[:, 0]  # type: ignore[index]
        answer = f"{shown.name} answers {GROUPS[int(scores.argmax())]}, where {GROUPS[int(labels)]} had more cues"
        path = folder / "trial.png"
        membranes, thresholds = potentials(shown.network.layer.neurons, states)  # type: ignore[union-attr]
        picture = evidence_accumulation_plots.trial(
            spikes[:, 0], activity, membranes[:, 0], thresholds[:, 0], answer, path
        )
        return found, [*pictures, picture]


def potentials(neurons: Any, states: list[Any]) -> tuple[Tensor, Tensor]:
    """Membrane potentials and thresholds of LIF or ALIF neurons, steps × trials × neurons."""
    if isinstance(neurons, LIF):
        membranes = torch.stack(states)
        return membranes, torch.full_like(membranes, neurons.threshold)
    membranes, adaptations = (torch.stack(values) for values in zip(*states, strict=True))
    return membranes, neurons.threshold + neurons.beta * adaptations
