"""How many patterns do content-addressable memories hold? Random ones, and corrupted digits."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from bioopt.nn import Hopfield, ModernHopfield, SpikingHopfield

from .. import data
from ..pace import Phase
from ..verdict import Expected
from . import Task, hopfield_plots
from .hopfield_plots import RULES, THEORY

CUES = 40  # the most patterns of a memory that are recalled
HELD = 0.9  # overlap: a random pattern is held with more than 0.96; one that is lost overlaps by about 0.35
RIGHT = 0.98  # overlap with a digit: two different ones can overlap by 0.8
MOST = 2**17  # patterns of a modern memory
Memory = Hopfield | ModernHopfield | SpikingHopfield


@dataclass(eq=False)
class Recall(Task):
    """Recall of random patterns and of real digits by Hopfield's memory, a spiking and a modern one.

    Four kinds of rounds, one after the other. *Loads*: Hebbian memories of several sizes, each filled with ``load``
    times as many random patterns as it has neurons, start in the patterns themselves; the share held is the share of
    them in which the overlap stays above 0.9. Below the critical load that share grows with the size N, above it falls:
    the critical load is where the curve of the largest memory crosses those of the others, on average. (The load at
    which half are lost falls with N as well. A straight line in ``1 / sqrt(N)`` extrapolates it to infinite N, but four
    sizes cannot distinguish this from other powers, which extrapolate to other loads.) *Rules*: all binary memories of
    one size from cues with errors. *Modern*: patterns are doubled until half of them are lost. *Digits*: the first
    images of the training set in black and white, from cues with errors and from their upper half; a digit is right if
    it overlaps by 0.98.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    neurons: list[int]  # sizes of the Hebbian memories
    loads: list[float]  # patterns per neuron in them
    samples: int  # memories of the largest size, and of each other in inverse proportion
    rules: int  # size of the memories with which rules are compared
    rule_loads: list[float]  # patterns per neuron in them
    flips: float  # the share of a cue's units that are wrong
    modern: list[int]  # sizes of modern memories
    digits: list[int]  # numbers of digits stored

    def __post_init__(self) -> None:
        self.require_counts("rules", "samples")
        for name, sizes in {"neurons": self.neurons, "modern": self.modern, "digits": self.digits}.items():
            if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
                raise ValueError(f"task.{name}={sizes} must be integers >= 1")
        for name, shares in {"loads": self.loads, "rule_loads": self.rule_loads}.items():
            least = min([*self.neurons, self.rules])
            if not shares or any(share * least < 1 for share in shares) or list(shares) != sorted(set(shares)):
                raise ValueError(f"task.{name}={shares} must rise, each at least one pattern in {least} neurons")
        if not 0 <= self.flips < 0.5:
            raise ValueError(
                f"task.flips={self.flips} must be at least 0 and below 0.5, where a cue carries no information"
            )
        images = data.from_config(self.config.data, self.device)
        if images.shape[0] != 1:
            raise ValueError(f"data={self.config.data.name} is in colour: choose digits, mnist or fashion_mnist")
        if max(self.digits) > len(images.train_images):
            raise ValueError(
                f"task.digits={self.digits}, but {self.config.data.name} has {len(images.train_images)} images"
            )
        self.shape = images.shape[1:]
        self.images = torch.where(images.train_images[: max(self.digits)].flatten(1) > 127, 1.0, -1.0)
        self.repeats = {n: max(1, self.samples * max(self.neurons) // n) for n in self.neurons}
        self.work: list[tuple[str, Any]] = [
            *(("load", a) for a in self.loads),
            *(("rule_load", a) for a in self.rule_loads),
            *(("modern", n) for n in self.modern),
            *(("digits", count) for count in self.digits),
        ]
        self.rounds = len(self.work)

    def round(self, number: int) -> dict[str, Any]:
        """One load, one size of a modern memory, or one number of digits."""
        kind, size = self.work[number - 1]
        measure = {"load": self._held, "rule_load": self._rules, "modern": self._modern, "digits": self._digits}[kind]
        return {kind: size} | measure(size)

    def _held(self, share: float) -> dict[str, float]:
        found = {}
        for n, samples in self.repeats.items():
            held = []
            for sample in range(samples):
                x = self._random(round(share * n), n)
                memory = self._binary(Hopfield(n, sweeps=500, seed=sample, device=self.device), x, "hebbian")
                held.append(_overlap(memory(x[:CUES]), x[:CUES]) > HELD)
            found[f"held_{n}"] = torch.cat(held).double().mean().item()
        return found

    def _rules(self, share: float) -> dict[str, float]:
        n = self.rules
        x = self._random(round(share * n), n)
        cues = self._flipped(x[:CUES])
        memories = {rule: self._binary(Hopfield(n, device=self.device), x, rule) for rule in RULES}
        memories["spiking"] = self._binary(SpikingHopfield(n, device=self.device), x, "hebbian")
        return {name: _share(memory(cues), x, HELD) for name, memory in memories.items()}

    def _modern(self, n: int) -> dict[str, float]:
        shares, count = [1.0], 1
        while shares[-1] >= 0.5 and count < MOST:
            count *= 2
            right = []
            for _ in range(max(1, 256 // count)):
                x = self._random(count, n)
                memory = ModernHopfield(n, count, device=self.device)
                memory.store(x)
                right.append(_share(memory(self._flipped(x[:256])), x, 1 - 1 / n))  # all units are right
            shares.append(sum(right) / len(right))
        return {"patterns": 2 ** _crossing(range(len(shares)), shares)} if shares[-1] < 0.5 else {"more_than": count}

    def _digits(self, count: int) -> dict[str, float]:
        x = self.images[:count]
        found = {}
        for name, memory in self._memories(count).items():
            for cue, cues in self._cues(x[:CUES]).items():
                found[f"{name}_{cue}"] = _share(memory(cues), x, RIGHT)
        return found

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The critical load of a network of infinitely many neurons."""
        return {"critical_load": [Expected([THEORY], "by theory")]}

    def phases(self) -> Sequence[Phase]:
        """The kinds of rounds."""
        counts = Counter(kind for kind, _ in self.work)
        return [Phase(count, name=kind.replace("_", " ")) for kind, count in counts.items()]

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The critical load and other capacities, and pictures: of capacities, of recalled digits and of dynamics."""
        lines = {kind: [line for line in history if kind in line] for kind in ("load", "rule_load", "modern", "digits")}
        fallen = ((n, _half(lines["load"], "load", f"held_{n}")) for n in self.repeats)
        half = {n: share for n, share in fallen if share is not None}
        found: dict[str, float] = {}
        largest = max(self.repeats)
        found_at = [_meeting(lines["load"], f"held_{n}", f"held_{largest}") for n in self.repeats if n < largest]
        crossings = [load for load in found_at if load is not None]
        if crossings:
            found["critical_load"] = statistics.fmean(crossings)
            found["critical_load_over_theory"] = found["critical_load"] / THEORY
        line = None
        if len(half) > 1:
            line = np.polyfit([n**-0.5 for n in half], list(half.values()), 1)
            found["extrapolated_load"] = float(line[1])
        found |= {f"half_held_at_load_{n}": share for n, share in half.items()}
        for name in (*RULES, "spiking"):
            share = _half(lines["rule_load"], "rule_load", name)
            found |= {} if share is None else {f"{name}_half_recalled_at_load": share}
        filled = {line["modern"]: line["patterns"] for line in lines["modern"] if "patterns" in line}
        if len(filled) > 1:
            doublings = np.polyfit(list(filled), [math.log2(count) for count in filled.values()], 1)[0]
            found["units_a_doubling_of_modern_capacity"] = 1 / float(doublings)
        for cue in ("flipped", "masked"):
            for name in (*RULES, "spiking", "modern"):
                held = [line["digits"] for line in lines["digits"] if line[f"{name}_{cue}"] >= 0.9]
                found[f"digits_{cue}_{name}"] = max(held, default=0)
        count = min(10, len(self.images))
        energies, units, patterns, spikes, digit, cue_duration = self._dynamics(count)
        found["largest_rise_of_energy"] = max(0.0, energies.diff(dim=0).max().item())
        return found, [
            hopfield_plots.capacity(lines, half, line, title, folder / "capacity.png"),
            hopfield_plots.recall(
                self._recalled(count), self.shape,
                f"{title}: one of {count} digits, from a cue with {self.flips:.0%} errors and from its half",
                folder / "recall.png",
            ),
            hopfield_plots.dynamics(
                energies, units, patterns, spikes, digit, cue_duration, title, folder / "dynamics.png"
            ),
        ]  # fmt: skip

    def _random(self, count: int, n: int) -> Tensor:
        return (torch.randint(0, 2, (count, n)) * 2.0 - 1).to(self.device)

    def _flipped(self, x: Tensor) -> Tensor:
        return torch.where((torch.rand(x.shape) < self.flips).to(x.device), -x, x)

    def _cues(self, x: Tensor) -> dict[str, Tensor]:
        known = torch.arange(x.shape[1], device=x.device) < x.shape[1] // 2
        return {"flipped": self._flipped(x), "masked": torch.where(known, x, 0)}

    def _binary(self, memory: Any, x: Tensor, rule: str) -> Any:
        memory.store(x, rule)
        return memory

    def _memories(self, count: int) -> dict[str, Memory]:
        """Memories of the first ``count`` digits; in the spiking one, other rules than the pseudo-inverse lose them."""
        x, n = self.images[:count], self.images.shape[1]
        memories: dict[str, Memory] = {rule: self._binary(Hopfield(n, device=self.device), x, rule) for rule in RULES}
        memories["spiking"] = self._binary(SpikingHopfield(n, device=self.device), x, "pseudo_inverse")
        memories["modern"] = ModernHopfield(n, count, device=self.device)
        memories["modern"].store(x)
        return memories

    def _recalled(self, count: int) -> dict[tuple[str, str], tuple[list[Tensor], bool]]:
        """One digit's states from the cue to the result, and whether it is right, for each kind of cue and memory."""
        which = min(3, count - 1)
        memories, found = self._memories(count), {}
        for cue, cues in self._cues(self.images[which : which + 1]).items():
            for name, memory in memories.items():
                states = [state.cpu() for state in _steps(memory, cues)]
                right = _overlap(states[-1], self.images[which].cpu()).item() > RIGHT
                found[cue, name] = states, right
        return found

    def _dynamics(self, count: int) -> tuple[Tensor, int, int, Tensor, Tensor, int]:
        """The arguments of `hopfield_plots.dynamics`, for random patterns, and for half of a digit as the cue."""
        n = self.rules
        x = self._random(max(1, n // 10), n).double()
        memory = self._binary(Hopfield(n, device=self.device, dtype=torch.float64), x, "hebbian")
        cues = torch.cat([self._flipped(x[:10]), self._random(10, n).double()])
        energies = memory.recall(cues, every=1).energies.cpu()
        spiking = self._memories(count)["spiking"]
        assert isinstance(spiking, SpikingHopfield)
        spikes = spiking.recall(self._cues(self.images[:1])["masked"]).spikes
        assert spikes is not None
        return energies, n, len(x), spikes[:, 0].cpu(), self.images[0].cpu(), spiking.cue_duration


def _steps(memory: Memory, cue: Tensor) -> list[Tensor]:
    """The cue, two states on the way, and the result; of spiking units, their firing rates on the way."""
    if isinstance(memory, Hopfield):
        states = list(memory.recall(cue, every=memory.units // 3).states[:, 0])
        return [states[0], states[1], states[2], states[-1]]
    path = memory.recall(cue)
    first, last = path.states[0, 0], path.states[-1, 0]
    if path.spikes is None:
        return [first, path.states[1, 0], path.states[min(2, len(path.states) - 1), 0], last]
    assert isinstance(memory, SpikingHopfield)
    early = [path.spikes[start : start + 20, 0].double().mean(0) for start in (0, memory.cue_duration)]
    return [first, *((2 * rate / memory.rate - 1).to(first) for rate in early), last]


def _overlap(state: Tensor, x: Tensor) -> Tensor:
    """``m``, of the signs: 1 is the pattern itself."""
    return (state.sign() * x).mean(-1)


def _share(recalled: Tensor, x: Tensor, least: float) -> float:
    """The share of cues, those of the first patterns, from which their pattern was recalled."""
    return (_overlap(recalled, x[: len(recalled)]) > least).double().mean().item()


def _meeting(lines: list[dict[str, Any]], small: str, large: str) -> float | None:
    """The last load at which the larger memory's share falls below the smaller one's; ``None`` if it never does."""
    met = None
    for before, after in itertools.pairwise(lines):
        p, q = before[large] - before[small], after[large] - after[small]
        if p >= 0 > q:
            met = before["load"] + (after["load"] - before["load"]) * p / (p - q)
    return met


def _half(lines: list[dict[str, Any]], load: str, share: str) -> float | None:
    """The load at which half are left; ``None`` if it is beyond the loads tried."""
    shares = [line[share] for line in lines]
    if shares[0] < 0.5 or min(shares) >= 0.5:
        return None
    return _crossing([line[load] for line in lines], shares)


def _crossing(where: Any, shares: list[float]) -> float:
    """Where the shares first fall through a half, by linear interpolation."""
    for (a, p), (b, q) in itertools.pairwise(zip(where, shares, strict=True)):
        if p >= 0.5 > q:
            return float(a + (b - a) * (p - 0.5) / (p - q))
    raise ValueError("the shares do not fall through a half")
