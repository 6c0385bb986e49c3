"""Pictures of `spin_glass`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..pictures import BLUE, ORANGE, VERMILION, mosaic, saved, style, uncluttered

if TYPE_CHECKING:
    from .spin_glass import Valleys

GROUND_STATE = -0.7632  # of the Sherrington-Kirkpatrick model, energy per spin (Parisi, 1979)


def four_panels(task: Valleys, title: str, same: Tensor, other: Tensor, folder: Path) -> Path:
    """Energies against temperature and distributions of overlaps, of the glass and of the machine."""
    figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    glass, machine, middles = task.glass, task.machine, task.middles()
    density = len(middles) / 2
    t = glass.temperatures.cpu()
    axes = grid[0][0]
    axes.plot(t, glass.mean("energy"), **style(BLUE), label="measured")
    warm = torch.linspace(1, float(t[-1]), 50)
    axes.plot(warm, -1 / (2 * warm), color="black", linewidth=1, label="theory, −1/(2T) for T > 1")
    axes.axhline(GROUND_STATE, color="grey", linestyle="--", linewidth=1, label=f"ground state, {GROUND_STATE}")
    axes.set(xlabel="temperature T", ylabel="energy per spin", title=f"Spin glass, N = {glass.units}")
    axes = grid[0][1]
    for place, i in enumerate(_spread(len(t))):
        axes.plot(middles, glass.mean("histogram")[i] * density, **style(place), label=f"T = {t[i]:.2f}")
    axes.set(
        xticks=[-1, -0.5, 0, 0.5, 1],
        xlabel="overlap q of two replicas",
        ylabel="P(q)",
        title="Spin glass: many valleys, by chance",
    )
    t, own = machine.temperatures.cpu(), task.own
    axes = grid[1][0]
    axes.plot(t, machine.mean("energy"), **style(ORANGE), label="measured")
    axes.axvline(1, color="grey", linestyle="--", linewidth=1, label="T = 1, where it has learned")
    units = "×".join(str(n) for n in reversed(task.rbm.weight.shape))
    axes.set(xlabel="temperature T", ylabel="energy per unit", title=f"Boltzmann machine, {units}, digits")
    axes = grid[1][1]
    for i, colour in ((own, ORANGE), (len(t) - 1, VERMILION)):
        axes.plot(middles, machine.mean("histogram")[i] * density, **style(colour), label=f"samples, T = {t[i]:.2f}")
    for q, name, line in ((same, "digits of one class", "-"), (other, "digits of two classes", "--")):
        counts = torch.histc(q, len(middles), -1, 1)
        axes.plot(middles, counts / counts.sum() * density, color="grey", linestyle=line, label=name)
    axes.set(xlabel="overlap q of two samples", ylabel="P(q)", title="Boltzmann machine: valleys that mean something")
    for row in grid:
        row[1].set_xticks([-1, -0.5, 0, 0.5, 1])
    for axes in grid.flat:
        uncluttered(axes)
        axes.legend(frameon=False, fontsize=8)
        axes.title.set_size(10)
    return saved(figure, folder / "spin_glass.png")


def by_temperature(task: Valleys, title: str, folder: Path) -> Path:
    """Visible states of the machine, a row for each of several temperatures."""
    t = task.machine.temperatures.cpu()
    rows = sorted({0, *_spread(len(t)), task.own})
    columns = min(16, task.machine.states.shape[2])
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(0.55 * columns + 0.9, 0.62 * len(rows) + 0.5), layout="constrained", squeeze=False
    )
    figure.suptitle(f"What the machine sees at temperature T: {title}", fontsize=9)
    for axes, i in zip(grid.flat, rows, strict=True):
        axes.imshow(mosaic(task.machine.states[0, i, :columns], task.images.shape, columns), cmap="Greys")
        axes.set_ylabel(f"T = {t[i]:.2f}", rotation=0, ha="right", va="center", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return saved(figure, folder / "machine_by_temperature.png")


def _spread(count: int) -> Sequence[int]:
    """Four of these indices, from first to last."""
    return sorted({round(i * (count - 1) / 3) for i in range(4)})
