"""Pictures of `hopfield`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from ..pictures import BLUE, GREEN, ORANGE, VERMILION, saved, style, uncluttered

THEORY = 0.138  # patterns per neuron, in the limit of many neurons: Amit, Gutfreund & Sompolinsky (1985)
RULES = ("hebbian", "storkey", "pseudo_inverse")


def recall(
    found: dict[tuple[str, str], tuple[list[Tensor], bool]], shape: tuple[int, ...], title: str, path: Path
) -> Path:
    """For each kind of cue and each memory, four states from the cue to the result, and whether that is right."""
    cues, memories = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    figure, grid = plt.subplots(len(memories), 9, figsize=(9.6, 1.15 * len(memories) + 0.9), layout="constrained")
    figure.suptitle(title)
    for (cue, memory), (states, right) in found.items():
        row, first = memories.index(memory), 5 * cues.index(cue)
        labels = (f"cue, {cue}", "→", "→", "result")
        for column, (state, label) in enumerate(zip(states, labels, strict=True)):
            axes = grid[row][first + column]
            axes.imshow(state.view(*shape).numpy(), cmap="Greys", vmin=-1, vmax=1)
            if row == 0:
                axes.set_title(label, fontsize=8)
        colour = GREEN if right else VERMILION
        grid[row][first + 3].set_xlabel("right" if right else "wrong", fontsize=8, color=colour)
        grid[row][0].set_ylabel(memory.replace("_", "-\n"), fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes in grid[:, 4]:
        axes.axis("off")
    return saved(figure, path)


def dynamics(
    energies: Tensor,
    units: int,
    patterns: int,
    spikes: Tensor,
    digit: Tensor,
    cue_duration: int,
    title: str,
    path: Path,
) -> Path:
    """Energies along asynchronous updates, of patterns with errors and of random states; and spikes of some units.

    Args:
        energies: updates × states.
        units: of the memory that is updated.
        patterns: in it.
        spikes: ms × units, of a spiking memory.
        digit: half of which was its cue.
        cue_duration: in ms.
        title: above the picture.
        path: where to write it.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title)
    updates = np.arange(len(energies)) / units
    corrupted = min(10, patterns)
    left.plot(updates, energies[:, :corrupted] / units, color=BLUE, linewidth=0.9)
    left.plot(updates, energies[:, corrupted:] / units, color=ORANGE, linewidth=0.9)
    left.plot([], [], color=BLUE, label="patterns with errors")
    left.plot([], [], color=ORANGE, label="random states")
    left.set(
        xlabel="updates of each unit", ylabel="energy / units", title=f"Hopfield, {units} units, {patterns} patterns"
    )
    left.set_xlim(0, min(8, updates[-1]))
    left.legend(frameon=False)
    order = digit.sort(descending=True, stable=True).indices
    some = order[:: max(1, len(order) // 150)]
    time, unit = spikes[:, some].nonzero(as_tuple=True)
    right.plot(time, unit, "|", markersize=2.5, color="black")
    right.axvspan(0, cue_duration, color=BLUE, alpha=0.15, linewidth=0)
    active = int((digit[some] > 0).sum())
    right.axhline(active - 0.5, color=VERMILION, linewidth=0.8)
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
    for place, name in enumerate(key for key in lines["load"][0] if key.startswith("held_")):
        held, label = [line[name] for line in lines["load"]], f"N = {name.removeprefix('held_')}"
        sizes.plot(loads, held, **style(place), label=label)
    sizes.axvline(THEORY, color="grey", linestyle=":", label=f"theory, {THEORY}")
    sizes.set(xlabel="load, patterns / N", ylabel="share of patterns held", title="Hebbian, from the pattern itself")
    if half:
        limit.plot([n**-0.5 for n in half], list(half.values()), "o", label="half of the patterns held")
    if line is not None:
        ends = np.array([0, max(n**-0.5 for n in half)])
        limit.plot(ends, line[0] * ends + line[1], color=BLUE, label=f"{line[1]:.3f} at N = ∞")
    limit.plot(0, THEORY, "*", color="grey", markersize=10, label=f"theory, {THEORY}", clip_on=False)
    limit.set(xlabel=r"$1 / \sqrt{N}$", ylabel="load", title="Hebbian, where half are lost", xlim=(0, None))
    for place, name in enumerate((*RULES, "spiking")):
        points = [(line["rule_load"], line[name]) for line in lines["rule_load"]]
        label = "spiking, Hebbian" if name == "spiking" else name.replace("_", "-")
        rules.plot(*zip(*points, strict=True), **style(place), label=label)
    rules.set(xlabel="load, patterns / N", ylabel="share recalled", title="from cues with errors")
    filled = {line["modern"]: line["patterns"] for line in lines["modern"] if "patterns" in line}
    modern.plot(list(filled), list(filled.values()), "o-", label="modern, half recalled from cues with errors")
    modern.plot(list(filled), [THEORY * n for n in filled], ":", color="grey", label=f"Hebbian, {THEORY} N")
    modern.set(xlabel="units", ylabel="patterns", yscale="log", title="modern")
    for axes in grid.flat:
        axes.legend(frameon=False, fontsize=8)
    uncluttered(*grid.flat)
    return saved(figure, path)
