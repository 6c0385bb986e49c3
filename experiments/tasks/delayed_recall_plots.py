"""The picture of `delayed_recall`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from ..pictures import BLUE, ORANGE, saved, style, uncluttered

if TYPE_CHECKING:
    from .delayed_recall import DelayedRecall

#: label, colour and line of each model
STYLES = {
    "buffer": ("buffer", BLUE, "-"),
    "fast_weights": ("fast weights", ORANGE, "-"),
    "gated_buffer": ("buffer, gated", BLUE, "--"),
    "gated_fast_weights": ("fast weights, gated", ORANGE, "--"),
    "gru": ("GRU, backpropagation", "black", "-"),
}


def picture(task: DelayedRecall, last: dict[str, Any], title: str, path: Path) -> Path:
    """Accuracy against delay and against load, with chance and with what the GRU has been trained on."""
    figure, grid = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    figure.suptitle(title)
    panels = [
        ("against_delay", task.delays, f"distractors between {task.load} pairs and the cue", (0, "delay")),
        ("against_load", task.loads, f"pairs to remember, {task.delay} distractors after them", (1, "load")),
    ]
    for axes, (key, along, label, (least, limit)) in zip(grid, panels, strict=True):
        trained = axes.axvspan(least, task.gru[limit], color="grey", alpha=0.15, linewidth=0)
        chance = axes.axhline(100 / task.values, color="grey", linewidth=0.8, linestyle=":")
        lines = [
            axes.plot(along, [100 * a for a in last[key][name]], linestyle=line, **style(colour))[0]
            for name, (_, colour, line) in STYLES.items()
        ]
        axes.set(xlabel=label, ylim=(0, 104))
        uncluttered(axes)
    grid[0].set_ylabel("right answers (%)")
    names = [label for label, _, _ in STYLES.values()]
    figure.legend(
        [*lines, chance, trained], [*names, "chance", "the GRU was trained on this"],
        loc="outside lower center", ncols=4, frameon=False,
    )  # fmt: skip
    return saved(figure, path)
