"""Pictures of `hopfield`, and what they show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from ..pictures import saved, uncluttered

THEORY = 0.138  # patterns per neuron, in the limit of many neurons: Amit, Gutfreund & Sompolinsky (1985)
RULES = ("hebbian", "storkey", "pseudo_inverse")


@dataclass
class Recalled:
    """The recall of a digit from a kind of cue: four states from the cue to the result, and whether that is right."""

    cue: str
    memory: str
    states: list[Tensor]
    right: bool


@dataclass
class Dynamics:
    """Energies of states along updates of ``units`` units, of patterns with errors and of random states; and spikes."""

    energies: Tensor  # updates × states
    units: int
    patterns: int
    spikes: Tensor  # ms × units, of a spiking memory
    digit: Tensor  # half of which was its cue
    cue_duration: int

    @property
    def largest_rise(self) -> float:
        """The largest increase of energy in an update, which is 0 in theory."""
        return max(0.0, self.energies.diff(dim=0).max().item())


def recall(found: list[Recalled], shape: tuple[int, ...], title: str, path: Path) -> Path:
    """Cue, path and result in each memory, a row for each, for both kinds of cues."""
    memories, cues = list(dict.fromkeys(each.memory for each in found)), list(dict.fromkeys(each.cue for each in found))
    figure, grid = plt.subplots(len(memories), 9, figsize=(9.6, 1.15 * len(memories) + 0.9), layout="constrained")
    figure.suptitle(title)
    for each in found:
        row, first = memories.index(each.memory), 5 * cues.index(each.cue)
        labels = (f"cue, {each.cue}", "→", "→", "result")
        for column, (state, label) in enumerate(zip(each.states, labels, strict=True)):
            axes = grid[row][first + column]
            axes.imshow(state.view(*shape).numpy(), cmap="Greys", vmin=-1, vmax=1)
            if row == 0:
                axes.set_title(label, fontsize=8)
        colour = "green" if each.right else "red"
        grid[row][first + 3].set_xlabel("right" if each.right else "wrong", fontsize=8, color=colour)
        grid[row][0].set_ylabel(each.memory.replace("_", "-\n"), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid[:, 4]:
        axes.axis("off")
    return saved(figure, path)


def dynamics(found: Dynamics, title: str, path: Path) -> Path:
    """Energy along asynchronous updates, and the spikes of some units."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title)
    energies, n = found.energies, found.units
    updates = np.arange(len(energies)) / n
    corrupted = min(10, found.patterns)
    left.plot(updates, energies[:, :corrupted] / n, color="tab:blue", linewidth=0.9)
    left.plot(updates, energies[:, corrupted:] / n, color="tab:orange", linewidth=0.9)
    left.plot([], [], color="tab:blue", label="patterns with errors")
    left.plot([], [], color="tab:orange", label="random states")
    left.set(
        xlabel="updates of each unit", ylabel="energy / units", title=f"Hopfield, {n} units, {found.patterns} patterns"
    )
    left.set_xlim(0, min(8, updates[-1]))
    left.legend(frameon=False)
    order = found.digit.sort(descending=True, stable=True).indices
    some = order[:: max(1, len(order) // 150)]
    time, unit = found.spikes[:, some].nonzero(as_tuple=True)
    right.plot(time, unit, "|", markersize=2.5, color="black")
    right.axvspan(0, found.cue_duration, color="tab:blue", alpha=0.15, linewidth=0)
    active = int((found.digit[some] > 0).sum())
    right.axhline(active - 0.5, color="tab:red", linewidth=0.8)
    right.set_ylim(len(some), -1)
    right.set(xlabel="ms (blue: half of a digit as the cue)", ylabel="some units, those of the digit first")
    right.set_title("spikes")
    uncluttered(left, right)
    return saved(figure, path)


def capacity(lines: dict[str, list[dict[str, Any]]], half: dict[int, float], line: Any, title: str, path: Path) -> Path:
    """The capacities of memories: the Hebbian ones by size, all rules, and the modern one."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    sizes, limit, rules, modern = grid.flat
    loads = [line["load"] for line in lines["load"]]
    for name in [key for key in lines["load"][0] if key.startswith("held_")]:
        sizes.plot(loads, [line[name] for line in lines["load"]], marker=".", label=f"N = {name.removeprefix('held_')}")
    sizes.axvline(THEORY, color="grey", linestyle=":", label=f"theory, {THEORY}")
    sizes.set(xlabel="load, patterns / N", ylabel="share of patterns held", title="Hebbian, from the pattern itself")
    if half:
        limit.plot([n**-0.5 for n in half], list(half.values()), "o", label="half of the patterns held")
    if line is not None:
        ends = np.array([0, max(n**-0.5 for n in half)])
        limit.plot(ends, line[0] * ends + line[1], color="tab:blue", label=f"{line[1]:.3f} at N = ∞")
    limit.plot(0, THEORY, "*", color="grey", markersize=10, label=f"theory, {THEORY}", clip_on=False)
    limit.set(xlabel=r"$1 / \sqrt{N}$", ylabel="load", title="Hebbian, where half are lost", xlim=(0, None))
    for name in (*RULES, "spiking"):
        points = [(line["rule_load"], line[name]) for line in lines["rule_load"]]
        label = "spiking, Hebbian" if name == "spiking" else name.replace("_", "-")
        rules.plot(*zip(*points, strict=True), marker=".", label=label)
    rules.set(xlabel="load, patterns / N", ylabel="share recalled", title="from cues with errors")
    filled = {line["modern"]: line["patterns"] for line in lines["modern"] if "patterns" in line}
    modern.plot(list(filled), list(filled.values()), "o-", label="modern, half recalled from cues with errors")
    modern.plot(list(filled), [THEORY * n for n in filled], ":", color="grey", label=f"Hebbian, {THEORY} N")
    modern.set(xlabel="units", ylabel="patterns", yscale="log", title="modern")
    for axes in grid.flat:
        axes.legend(frameon=False, fontsize=8)
    uncluttered(*grid.flat)
    return saved(figure, path)
