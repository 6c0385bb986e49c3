"""Delayed reward: a cue, a delay, an action, and some time later a reward, the only thing that teaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.costs import Cost
from bioopt.nn import LIF, LeakyRate

from ..learner import Block, Learner
from ..verdict import Expected
from . import delayed_reward_plots
from .side_by_side import SideBySide

PER_CUE = 10  # input neurons
PER_ACTION = 5  # neurons


class Noisy(nn.Module):
    """Neurons with a random current of their own, so that no two trials are alike."""

    def __init__(self, neurons: nn.Module, current: float) -> None:
        super().__init__()
        self.neurons, self.current = neurons, current

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The activity, and the state, as of the neurons."""
        activity, state = self.neurons(u + self.current * torch.randn_like(u), state)
        return activity, state


class Agent(nn.Module):
    """A layer of plastic synapses from cues to neurons, a group for each action, and a slow memory of their activity.

    The action is that of the group with the largest memory at the time of acting. The network goes on until the reward
    comes, as its neurons do.

    Args:
        cues: how many there are, each with an action of its own.
        neurons: of the groups.
        tau_memory: time constant of the memory, in time steps.
        acting: at how many time steps before the end of an episode the action is taken.
    """

    def __init__(self, cues: int, neurons: nn.Module, tau_memory: float, acting: int) -> None:
        super().__init__()
        self.layer = nn.Linear(cues * PER_CUE, cues * PER_ACTION, bias=False)
        nn.init.constant_(self.layer.weight, 0.4)  # no action is preferred
        self.neurons, self.memory, self.acting = neurons, LeakyRate(tau_memory, None), acting

    def forward(self, xs: Tensor) -> Tensor:
        """From input spikes, steps × episodes × inputs, to the memory of each action, episodes × actions."""
        state, memory, kept = None, None, []
        for x in xs:
            activity, state = self.neurons(self.layer(x), state)
            now, memory = self.memory(activity.unflatten(1, (-1, PER_ACTION)).mean(2), memory)
            kept.append(now)
        chosen: Tensor = kept[len(xs) - 1 - self.acting]
        return chosen


class Reward(Cost):
    """Minus the reward: 1 for the action that belongs to the cue, else 0."""

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N numbers, without a gradient."""
        assert targets is not None
        return -outputs.argmax(1).eq(targets).to(outputs.dtype)


@dataclass(eq=False)
class DelayedReward(SideBySide):
    """Each cue has one action that is rewarded, and the reward comes some time after the action.

    `bioopt.RewardHebbian` teaches neurons with a rate, `bioopt.RewardSTDP` spiking ones; both see nothing but the
    reward. Each is compared with itself without a trace (a time constant of 0): of the coincidences of an episode, only
    those in the time step of the reward count then. Each learns with every delay of the reward.
    """

    known = ("reward_hebbian", "hebbian_no_trace", "reward_stdp", "stdp_no_trace")

    _: KW_ONLY
    cues: int  # and actions: chance is one over it
    cue: int  # time steps for which it is shown
    delay: int  # time steps between the cue and the action
    waits: Sequence[int]  # time steps between the action and the reward
    shown_wait: int  # the one of them whose learning curves are drawn
    rate: float  # spikes per time step of an input neuron while its cue is shown
    noise: float  # and of all of them at any time
    tau_trace: float  # of the eligibility, in time steps
    tau_memory: float  # of the memory for the action
    tau: float  # of the neurons
    threshold: float  # of the spiking ones
    current: float  # standard deviation of the random current of all neurons
    hebbian: dict[str, Any]  # options of `bioopt.RewardHebbian`
    stdp: dict[str, Any]  # options of `bioopt.RewardSTDP`
    batch_size: int  # episodes of a step
    steps: int  # of a round
    trials: int  # fresh episodes, tested after each round

    def check(self) -> None:
        """Raise for options that are out of range."""
        self.require_counts("cue", "batch_size", "steps", "rounds", "trials")
        self.require_counts("cues", least=2)
        self.require_counts("delay", least=0)
        if not self.waits or min(self.waits) < 0 or sorted({*self.waits}) != [*self.waits]:
            raise ValueError(f"task.waits={list(self.waits)} must be time steps >= 0, in order, such as [0,20,80]")
        if self.shown_wait not in self.waits:
            raise ValueError(f"task.shown_wait={self.shown_wait} must be one of task.waits={list(self.waits)}")

    def runs(self) -> list[str]:
        """A network for each learner and each delay of the reward."""
        return [run_of(name, wait) for name in self.learners for wait in self.waits]

    def learner(self, name: str) -> Learner:
        """One network with its rule."""
        rule, wait = name.split("@")
        trace = 0.0 if rule.endswith("no_trace") else self.tau_trace
        neurons = LeakyRate(self.tau) if "hebbian" in rule else LIF(self.tau, threshold=self.threshold)
        agent = Agent(self.cues, Noisy(neurons, self.current), self.tau_memory, int(wait)).to(self.device)
        optimizer: bioopt.LearningRule
        if "hebbian" in rule:
            decay = math.exp(-1 / trace) if trace else 0.0
            optimizer = bioopt.RewardHebbian(agent, trace_decay=decay, seed=self.config.seed, **self.hebbian)
        else:
            optimizer = bioopt.RewardSTDP(agent, tau_e=trace, **self.stdp)
        option = "hebbian" if "hebbian" in rule else "stdp"
        block = Block(agent, Reward(), optimizer)
        return Learner(agent, [block], name=name, rate=f"task.{option}.lr={getattr(self, option)['lr']}")

    def round(self, number: int) -> dict[str, Any]:
        """Train each network on the same episodes, and test it on the same fresh ones."""
        line: dict[str, Any] = {"episodes": number * self.steps * self.batch_size}
        state = torch.get_rng_state()
        for name in self.learners:
            rewards = []
            for wait in self.waits:
                torch.set_rng_state(state)
                learner = self.made[run_of(name, wait)]
                learner.moment = f"round {number}"
                learner.fit([self.drawn(self.batch_size, wait) for _ in range(self.steps)])
                actions, labels = learner.predict([self.drawn(self.trials, wait)])
                rewards.append((actions.argmax(1) == labels).double().mean().item())
            line[name] = rewards[self.waits.index(self.shown_wait)]
            line[f"{name}_against_wait"] = rewards
        return line

    def drawn(self, count: int, wait: int) -> tuple[Tensor, Tensor]:
        """Fresh episodes: input spikes, steps × episodes × inputs, and the cue, which is also the right action."""
        cue = torch.randint(self.cues, (count,))
        rates = torch.full((self.cue + self.delay + wait + 1, count, self.cues), self.noise)
        rates[: self.cue] += (self.rate - self.noise) * F.one_hot(cue, self.cues)
        spikes = torch.rand(*rates.shape[:2], self.cues * PER_CUE) < rates.repeat_interleave(PER_CUE, 2)
        return spikes.float().to(self.device), cue.to(self.device)

    def shown(self, line: dict[str, Any]) -> str:
        """The share of rewarded episodes, with the delay whose curves are drawn."""
        return "   ".join(f"{name} {100 * line[name]:.1f}%" for name in self.learners)

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """Chance."""
        return {name: [Expected([1 / self.cues], "by chance")] for name in self.learners}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Of each rule, the share of rewarded episodes after the last round, for each delay of the reward."""
        found = {name: history[-1][name] for name in self.learners}
        for name in self.learners:
            pairs = zip(self.waits, history[-1][f"{name}_against_wait"], strict=True)
            found |= {f"{name}_wait_{wait}": reward for wait, reward in pairs}
        found["chance"] = 1 / self.cues
        return found, [delayed_reward_plots.picture(self, history, title, folder / "reward.png")]


def run_of(name: str, wait: int) -> str:
    """The network of a learner with a delay of the reward."""
    return f"{name}@{wait}"
