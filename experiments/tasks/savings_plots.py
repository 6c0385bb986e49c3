"""Pictures of `savings`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..pictures import BLUE, VERMILION, saved, style, uncluttered
from ..statistics import percent, whisker

#: what is compared, by its label and colour; B comes between, and the last two start where B ends
PHASES = {
    "first": ("A, the first time", "black"),
    "other": ("C instead, never seen before", BLUE),
    "again": ("A again, after B", VERMILION),
}


def bars(rules: list[str], history: list[dict[str, Any]], most: int, title: str, path: Path) -> Path:
    """Savings and the control for each rule: mean, 95 % interval of three or more repetitions, and these as points."""
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.62 * len(rules)), layout="constrained")
    figure.suptitle(title)
    for row, rule in enumerate(rules):
        lines = [line for line in history if line["rule"] == rule and "savings" in line]  # in which it learned A
        for key, phase, shift in (("savings", "again", -0.18), ("control", "other", 0.18)):
            label, colour = PHASES[phase]
            if values := [line[key] for line in lines]:
                mean, half = 100 * statistics.fmean(values), whisker(values)
                axes.barh(
                    row + shift, mean, 0.32, color=colour, alpha=0.5, label=label,
                    xerr=None if half is None else 100 * half, error_kw={"capsize": 3, "elinewidth": 1},
                )  # fmt: skip
                points = [100 * value for value in values]
                axes.plot(points, [row + shift] * len(points), "o", color=colour, markersize=3, alpha=0.6)
        alone = [line["implicit"] for line in lines]
        note = f"{percent(alone)} %" if alone else f"A not learned in {most} steps"
        axes.annotate(note, (1.02, row), xycoords=("axes fraction", "data"), fontsize=9, va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rules)), [rule.replace("_", " ") for rule in rules])
    axes.invert_yaxis()
    axes.annotate("fewer steps for A\nthan for C", (1.02, 1.01), xycoords="axes fraction", fontsize=9)
    axes.set_xlabel("steps saved, of those that A took the first time (%)")
    uncluttered(axes, grid="x")
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return saved(figure, path)


def curves(rules: list[str], history: list[dict[str, Any]], criterion: float, title: str, path: Path) -> Path:
    """Test accuracy against steps, a panel for each rule: means, and bands over the repetitions."""
    columns = min(3, len(rules))
    rows = math.ceil(len(rules) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.7 * rows + 0.8), layout="constrained", squeeze=False, sharey=True
    )
    figure.suptitle(title)
    for axes, rule in zip(grid.flat, rules, strict=False):
        for phase, (label, colour) in PHASES.items():
            courses = [line["courses"][phase] for line in history if line["rule"] == rule and phase in line["courses"]]
            longest = max(map(len, courses), default=0)
            held = [course + course[-1:] * (longest - len(course)) for course in courses]  # it ends when learned
            at_step = [[100 * a for a in accuracies] for accuracies in zip(*held, strict=True)]
            least, most = list(map(min, at_step)), list(map(max, at_step))
            axes.fill_between(range(longest), least, most, color=colour, alpha=0.15, linewidth=0)
            axes.plot(list(map(statistics.fmean, at_step)), **style(colour), linewidth=1.8, label=label)
        axes.axhline(100 * criterion, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(rule.replace("_", " "), fontsize=10)
        uncluttered(axes)
    for axes in grid.flat[len(rules) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return saved(figure, path)
