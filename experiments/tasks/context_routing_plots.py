"""Pictures of `context_routing`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..pictures import COLOURS, saved, uncluttered
from ..statistics import whisker

if TYPE_CHECKING:
    from .context_routing import ContextRouting


def bars(task: ContextRouting, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Accuracy of each network and rule: mean, 95 % confidence interval, repetitions as points; computation."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    figure.suptitle(title)
    width = 0.8 / len(task.rules)
    ticks = []
    for place, name in enumerate(task.networks):
        for i, rule in enumerate(task.rules):
            values = [100 * a for a in task.each(history, rule, name, "accuracy")]
            at = place + (i - (len(task.rules) - 1) / 2) * width
            axes.bar(
                at, statistics.fmean(values), 0.92 * width, color=COLOURS[i % len(COLOURS)], alpha=0.55,
                label=rule.replace("_", " ") if place == 0 else None,
                yerr=whisker(values), error_kw={"capsize": 2, "elinewidth": 1},
            )  # fmt: skip
            axes.plot([at] * len(values), values, ".", color="black", markersize=3, alpha=0.6)
        computed = statistics.fmean(line["computation"] for line in history if line["network"] == name)
        ticks.append(f"{label(task, name)}\n{100 * computed:.3g} %")
    guess = 100 * statistics.fmean(line["guess"] for line in history)
    axes.axhline(guess, color="grey", linestyle="--", linewidth=1, label="perfect, without the context")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(0, 100)
    axes.set_ylabel("test accuracy over all contexts (%)")
    axes.set_xlabel("network, and its multiply-adds for an image, of those of all pathways")
    uncluttered(axes, grid="y")
    figure.legend(loc="outside lower center", ncols=len(task.rules) + 1, frameon=False)
    return saved(figure, path)


def label(task: ContextRouting, network: str) -> str:
    """The label of a network."""
    known = {
        "fixed": f"fixed routing\n1 of {task.pathways}",
        "all_run": f"gated\nall {task.pathways} run",
        "connected": "fully\nconnected",
        "no_context": "connected,\nno context",
    }
    return known.get(network) or f"learned routing\n{network.removeprefix('routed_')} of {task.pathways}"


def routes(
    task: ContextRouting, history: list[dict[str, Any]], information: Callable[[Tensor], float], title: str, path: Path
) -> Path:
    """Gates of the first repetition, contexts × pathways: at the random start, and after rules that moved them."""
    rows = [*task.networks[1 : 1 + len(task.active)], "all_run"]
    shown = [e for e in history if e["network"] in rows and e["repetition"] == 0]
    learned = [r for r in task.rules if any(e["gates"] != e["gates_at_start"] for e in shown if e["rule"] == r)]
    columns = ["random start", *learned]
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=(0.6 + 0.24 * task.pathways * len(columns),
        1.2 + (0.75 + 0.28 * task.contexts) * len(rows)), layout="constrained", squeeze=False, sharex=True,
        sharey=True,
    )  # fmt: skip
    figure.suptitle(f"{title}: how far each pathway's gate is open, repetition 0", fontsize=10)
    for line, name in zip(grid, rows, strict=True):
        first = [e for e in shown if e["network"] == name]
        gates = [first[0]["gates_at_start"], *(e["gates"] for e in first if e["rule"] in learned)]
        bits = [information(torch.tensor(each)) for each in gates]
        for axes, column, each, known in zip(line, columns, gates, bits, strict=True):
            axes.imshow(each, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for context, row in enumerate(each):
                for pathway, g in enumerate(row):
                    if g > 0:
                        axes.text(
                            pathway, context, f"{g:.2f}"[g < 0.995 :], ha="center", va="center", fontsize=7,
                            color="white" if g > 0.5 else "black",
                        )  # fmt: skip
            axes.set_title(f"{column.replace('_', ' ')}: {known:.2g} bits", fontsize=8)
            axes.set_xticks(range(task.pathways), range(1, task.pathways + 1))
            axes.set_yticks(range(task.contexts), range(1, task.contexts + 1))
            axes.tick_params(length=0, labelsize=7)
        line[0].set_ylabel(f"{label(task, name)}\n\ncontext", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("pathway", fontsize=8)
    return saved(figure, path)
