"""What `meta_cost` compares: one cost for all tasks, with costs chosen for each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from ..statistics import interval, percent

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
