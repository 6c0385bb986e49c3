"""Pictures of `architectures`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..pictures import VERMILION, saved
from ..statistics import interval

if TYPE_CHECKING:
    from .architectures import Architectures


def maps(experiment: Architectures, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Accuracy in cells, tasks by structures, a panel for each rule; the best of a row framed."""
    columns = min(2, len(experiment.rules))
    rows = math.ceil(len(experiment.rules) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(8.4, 0.9 + rows * (0.8 + 0.42 * len(experiment.tasks))), layout="constrained",
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    figure.suptitle(f"{title}: test accuracy (%)")
    for axes, rule in zip(grid.flat, experiment.rules, strict=False):
        shown = panel(experiment, axes, history, rule)
    for axes in grid.flat[len(experiment.rules) :]:
        axes.axis("off")
    figure.colorbar(shown, ax=grid, shrink=0.6, aspect=30)
    note = "framed: the best of a row; solid where the 95 % interval of its lead over the next leaves out zero"
    figure.supxlabel(note, fontsize=9)
    return saved(figure, path)


def panel(experiment: Architectures, axes: Axes, history: list[dict[str, Any]], rule: str) -> Any:
    """One rule's cells."""
    cells = [
        [100 * statistics.fmean(experiment.each(history, task, rule, structure)) for structure in experiment.structures]
        for task in experiment.tasks
    ]
    shown = axes.imshow(cells, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for row, task in enumerate(experiment.tasks):
        for column, value in enumerate(cells[row]):
            colour = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=11)
        if len(experiment.structures) > 1:
            best = experiment.structures.index(experiment.ranked(history, task, rule)[0])
            lead = experiment.lead(history, task, rule)
            half = interval(lead)
            clear = half is not None and statistics.fmean(lead) > half
            corner = (best - 0.46, row - 0.44)
            axes.add_patch(
                Rectangle(corner, 0.92, 0.88, fill=False, edgecolor=VERMILION, lw=2.2, ls="-" if clear else (0, (2, 2)))
            )
    axes.set_title(rule.replace("_", " "), fontsize=12)
    axes.set_xticks(range(len(experiment.structures)), [name.replace("_", " ") for name in experiment.structures])
    axes.set_yticks(range(len(experiment.tasks)), [name.replace("_", " ") for name in experiment.tasks])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return shown
