"""The pictures of `pattern_generation`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..pictures import saved, uncluttered
from .side_by_side_plots import STYLES, learning

if TYPE_CHECKING:
    from .pattern_generation import PatternGeneration


def errors(task: PatternGeneration, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """The normalised error against steps of training."""
    figure, axes = learning(task, history, title)
    axes.set(xlabel="steps", ylabel="normalised mean squared error", yscale="log")
    uncluttered(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return saved(figure, path)


def patterns(curves: dict[str, Tensor], target: Tensor, title: str, path: Path) -> Path:
    """The curves of each network after learning, steps × outputs, and the target behind them."""
    figure, grid = plt.subplots(
        target.shape[1], len(curves), figsize=(3 * len(curves), 1.6 * target.shape[1] + 0.6),
        layout="constrained", sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    figure.suptitle(title)
    for column, (name, drawn) in zip(grid.T, curves.items(), strict=True):
        label, colour, _ = STYLES[name]
        column[0].set_title(label, fontsize=9)
        for axes, wanted, made in zip(column, target.T.cpu(), drawn.T.cpu(), strict=True):
            axes.plot(wanted.numpy(), color="lightgrey", linewidth=3)
            axes.plot(made.numpy(), color=colour, linewidth=1)
            uncluttered(axes)
        column[-1].set_xlabel("time step")
    return saved(figure, path)
