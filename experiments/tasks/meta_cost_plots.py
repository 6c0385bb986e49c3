"""What `meta_cost` compares, one cost for all tasks with costs chosen for each, in a table and in pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from .. import pictures
from ..pictures import BLUE, VERMILION, saved, style, uncluttered
from ..statistics import interval, percent

if TYPE_CHECKING:
    from .meta_cost import MetaCost

COLOURS = (*pictures.COLOURS, "0.6", "0.3", "0.85")  # of costs
LOOPS = {"optuna": "Optuna", "perturbation": "perturbation"}  # the outer loops, with their labels
STRATEGIES = ("one_size", "best_cost", *LOOPS)  # to choose the cost of a task; the others are compared with the first
LABELS = {"best_cost": "best cost of each", **LOOPS}


class Result:
    """The results of a learner over all tasks and repetitions.

    Args:
        lines: of its rounds.
        problems: the tasks.
        costs: that were compared.
    """

    def __init__(self, lines: list[dict[str, Any]], problems: Iterable[str], costs: list[str]) -> None:
        self.lines = {problem: [line for line in lines if line["problem"] == problem] for problem in problems}
        self.costs = costs
        #: the cost that is best on average over all tasks, by validation
        self.one_size = max(
            costs, key=lambda cost: statistics.fmean(line["chosen"][cost]["validation"] for line in lines)
        )

    def tests(self, problem: str, strategy: str) -> list[float]:
        """Test accuracy of each repetition, of a cost, an outer loop, the best cost there, or the one size."""
        return [
            line["chosen"][{"one_size": self.one_size, "best_cost": line["best_cost"]}.get(strategy, strategy)]["test"]
            for line in self.lines[problem]
        ]

    def gains(self, strategy: str, *problems: str) -> list[float]:
        """Its gain over the one size in each repetition, averaged over these tasks, or over all."""
        each = [
            [a - b for a, b in zip(self.tests(problem, strategy), self.tests(problem, "one_size"), strict=True)]
            for problem in problems or self.lines
        ]
        return list(map(statistics.fmean, zip(*each, strict=True)))

    def mean(self, row: str, column: str) -> float:
        """Test accuracy over the repetitions of a task, or of all tasks."""
        return statistics.fmean(
            a for problem in self.lines if row in (problem, "mean") for a in self.tests(problem, column)
        )

    def chosen(self, row: str, column: str) -> int:
        """In how many repetitions of a task this cost was the best by validation."""
        return sum(line["best_cost"] == column for line in self.lines.get(row, []))

    def verdict(self) -> str:
        """Whether anything is significantly better than one size for all, in a sentence."""
        better = []
        for strategy in STRATEGIES[1:]:
            half = interval(gains := self.gains(strategy))
            if half is not None and statistics.fmean(gains) > half:
                better.append(LABELS[strategy])
        size = self.one_size.replace("_", " ")
        return f"{size} for all is not enough" if better else f"nothing is surely better than {size} for all"

    def margins(self) -> str:
        """The gain of each other strategy over the one size, averaged over the tasks, in points."""
        return ", ".join(f"{LABELS[strategy]} {percent(self.gains(strategy), '+')}" for strategy in STRATEGIES[1:])

    def table(self, rule: str) -> list[str]:
        """Rows of Markdown: accuracies of each task, and differences to the one size, paired."""
        head = [f"one size: {self.one_size.replace('_', ' ')}", *(LABELS[strategy] for strategy in STRATEGIES[1:])]
        lines = [
            f"| {rule.replace('_', ' ')}, test accuracy, % | " + " | ".join(head) + " |",
            "|---|---:|---:|---:|---:|",
        ]
        for problem in self.lines:
            cells = [percent(self.tests(problem, strategy)) for strategy in STRATEGIES]
            cells[1:] = [
                f"{cell} ({percent(self.gains(strategy, problem), '+')})"
                for cell, strategy in zip(cells[1:], STRATEGIES[1:], strict=True)
            ]
            lines.append(f"| {problem.replace('_', ' ')} | " + " | ".join(cells) + " |")
        mean = [
            f"{100 * self.mean('mean', 'one_size'):.2f}",
            *(percent(self.gains(strategy), "+") for strategy in STRATEGIES[1:]),
        ]
        lines.append("| mean | " + " | ".join(mean) + " |")
        lines += ["", f"{rule.replace('_', ' ')}: {self.verdict()} (points: {self.margins()}).", ""]
        lines += [
            f"| {rule.replace('_', ' ')}, mean of tasks | test accuracy, % | over the one size |",
            "|---|---:|---:|",
        ]
        for cost in sorted(self.costs, key=lambda cost: -self.mean("mean", cost)):
            over = "" if cost == self.one_size else percent(self.gains(cost), "+")
            lines.append(f"| {cost.replace('_', ' ')} | {100 * self.mean('mean', cost):.2f} | {over} |")
        return [*lines, ""]


def heat(task: MetaCost, results: dict[str, Result], title: str, path: Path) -> Path:
    """Test accuracy of each task and cost, coloured by its difference to the one size, a panel for each learner."""
    columns, rows = [*task.costs, *LOOPS], [*task.problems, "mean"]
    figure, panels = plt.subplots(
        len(results), 1, figsize=(8.4, 1.3 + len(results) * (0.7 + 0.42 * len(rows))), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    figure.suptitle(title)
    places = [*range(len(task.costs)), *(len(task.costs) + 0.25 + i for i in range(len(LOOPS)))]
    most = 5
    colours = plt.get_cmap("RdBu")
    for axes, (rule, result) in zip(panels[:, 0], results.items(), strict=True):
        means = {row: {c: result.mean(row, c) for c in columns} for row in rows}
        for y, row in enumerate(rows):
            for x, column in zip(places, columns, strict=True):
                away = 100 * (means[row][column] - means[row][result.one_size])
                shade = max(-1, min(away / most, 1))
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours(0.5 + shade / 2), edgecolor="white")
                )
                times, ink = result.chosen(row, column), "white" if abs(shade) > 0.7 else "black"
                axes.text(
                    x, y - 0.1 * bool(times), f"{100 * means[row][column]:.1f}", ha="center", va="center",
                    fontsize=9, weight="bold" if times else None, color=ink,
                )  # fmt: skip
                if times:
                    axes.text(x, y + 0.29, "●" * times, ha="center", va="center", fontsize=4, color=ink)
        x = task.costs.index(result.one_size)
        axes.add_patch(Rectangle((x - 0.5, -0.5), 1, len(rows), fill=False, edgecolor="black", linewidth=1.6, zorder=3))
        axes.axhline(len(rows) - 1.5, color="white", linewidth=4)
        axes.set(xlim=(-0.55, places[-1] + 0.55), ylim=(len(rows) - 0.45, -0.55))
        axes.set_xticks(places, [LOOPS.get(c, c).replace("_", "\n") for c in columns], fontsize=8)
        axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows], fontsize=9)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(
            f"{rule.replace('_', ' ')}: {result.verdict()},\nin points of test accuracy: {result.margins()}",
            fontsize=9, loc="left", pad=8,
        )  # fmt: skip
        scale = ScalarMappable(Normalize(-most, most), colours)
        bar = figure.colorbar(scale, ax=axes, aspect=25, extend="both", pad=0.01)
        bar.set_label("points above the one size", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.supxlabel(
        "test accuracy (%)   frame: the one size, best on average by validation\n"
        "●: the best by validation, a dot for each repetition   right: what the outer loops chose", fontsize=8,
    )  # fmt: skip
    return saved(figure, path)


def paths(task: MetaCost, results: dict[str, Result], title: str, path: Path) -> Path:
    """What the outer loops went through: shares after each step, and the best validation accuracy so far."""
    figure, grid = plt.subplots(
        2 * len(results), len(task.problems), figsize=(2.1 * len(task.problems) + 0.4, 3.6 * len(results) + 1.1),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    figure.suptitle(title)
    for (rule, result), (shares, curves) in zip(results.items(), zip(grid[::2], grid[1::2], strict=True), strict=True):
        for axes, problem in zip(shares, task.problems, strict=True):
            stack(task, axes, result.lines[problem])
            axes.set_title(problem.replace("_", " "), fontsize=10)
        for axes, problem in zip(curves, task.problems, strict=True):
            curve(task, axes, result.lines[problem])
        shares[0].set_ylabel(f"{rule.replace('_', ' ')}\nshare of each cost (%)", fontsize=8)
        curves[0].set_ylabel("best validation\naccuracy so far (%)", fontsize=8)
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
    named = dict[str, Any]()
    for axes in (grid[0, 0], grid[1, 0]):
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return saved(figure, path)


def stack(task: MetaCost, axes: Axes, lines: list[dict[str, Any]]) -> None:
    """Mean shares after each step of the perturbation, and of the best that either loop has seen."""
    path = [[100 * statistics.fmean(step) for step in zip(*at, strict=True)] for at in
            zip(*(line["path"] for line in lines), strict=True)]  # fmt: skip
    last = len(path) - 1
    labels = [name.replace("_", " ") for name in task.costs]
    axes.stackplot(range(len(path)), *zip(*path, strict=True), colors=COLOURS, labels=labels, linewidth=0)
    for i, loop in enumerate(reversed(LOOPS)):
        base = 0.0
        for j in range(len(task.costs)):
            share = 100 * statistics.fmean(line["chosen"][loop]["shares"][j] for line in lines)
            axes.bar(last + (1 + 1.1 * i) * last / 5, share, 0.9 * last / 5, base, color=COLOURS[j])
            base += share
    ends = [last + (1 + 1.1 * i) * last / 5 for i in range(len(LOOPS))]
    axes.set_xticks([0, last, *ends], ["0", str(last), *(LOOPS[loop][0].upper() for loop in reversed(LOOPS))])
    axes.set(xlabel="outer step, best seen", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)


def curve(task: MetaCost, axes: Axes, lines: list[dict[str, Any]]) -> None:
    """The best so far against inner learnings: mean, and range over repetitions."""
    for loop, colour in zip(LOOPS, ("black", VERMILION), strict=True):
        courses = [[100 * max(line["tried"][loop][: n + 1]) for n in range(task.learnings)] for line in lines]
        at = list(zip(*courses, strict=True))
        learned = range(1, task.learnings + 1)
        axes.fill_between(learned, list(map(min, at)), list(map(max, at)), color=colour, alpha=0.12, linewidth=0)
        name = f"{LOOPS[loop]} ({LOOPS[loop][0].upper()})"
        axes.plot(learned, list(map(statistics.fmean, at)), **style(colour), linewidth=1.6, label=name)
    grid = 100 * statistics.fmean(line["chosen"][line["best_cost"]]["validation"] for line in lines)
    count = len(task.costs) * len(task.rates)
    axes.axhline(grid, color=BLUE, linewidth=1, linestyle="--", label=f"best single cost, of {count} learnings")
    axes.set_xlabel("inner learnings")
    uncluttered(axes)
