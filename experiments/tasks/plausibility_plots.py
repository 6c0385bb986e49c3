"""Picture of `plausibility`: a table of rules by measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from ..pictures import saved

#: the measures in the order of columns, with their heads; groups are apart
COLUMNS = (
    {"transport": "weights\nabove"},
    {"other_layers": "other\nlayers", "other_neurons": "other\nneurons", "other_samples": "other\nsamples"},
    {"labels": "labels", "error": "output\nerror", "loss": "value of\nthe loss"},
    {"layers_above": "layers\nabove\nran"},
    {"feedback_reads": "feedback\nreads W"},
)
HEADS = ("transport", "locality", "signals", "locking", "matching")
NO, YES, UNKNOWN = "#56B4E9", "#E69F00", "#FFFFFF"  # Okabe-Ito: blue and orange are told apart by everyone


def table(cards: Mapping[str, Mapping[str, float]], title: str, path: Path) -> Path:
    """A row for each rule, a column for each measure: blue where the trunk's updates do not depend on it.

    Args:
        cards: for each rule, the largest value of each measure in its trunk; those that were not measured are missing.
        title: above the table.
        path: where to write it.
    """
    places, place = {}, 0.0
    for group in COLUMNS:
        for measure in group:
            places[measure] = place
            place += 1
        place += 0.25
    width, rows = place - 0.25, len(cards)
    figure, axes = plt.subplots(figsize=(2.6 + 0.72 * width, 1.3 + 0.25 * rows), layout="constrained")
    axes.set_title(f"{title}: does a hidden layer's update depend on ...", fontsize=10, loc="left")
    for row, card in enumerate(cards.values()):
        for measure, x in places.items():
            value = card.get(measure)
            colour, text = (UNKNOWN, "–") if value is None else (YES, percent(value)) if value else (NO, "no")
            axes.add_patch(
                Rectangle((x + 0.03, row + 0.05), 0.94, 0.9, facecolor=colour, edgecolor="lightgrey", lw=0.5)
            )
            axes.text(x + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)
    for group, head in zip(COLUMNS, HEADS, strict=True):
        middle = sum(places[measure] + 0.5 for measure in group) / len(group)
        axes.text(middle, -1.75, head, ha="center", va="bottom", fontsize=8, fontweight="bold")
        for measure, name in group.items():
            axes.text(places[measure] + 0.5, -0.1, name, ha="center", va="bottom", fontsize=7, linespacing=0.95)
    axes.set_yticks([row + 0.5 for row in range(rows)], [rule.replace("_", " ") for rule in cards], fontsize=8)
    axes.set(xlim=(-0.05, width + 0.05), ylim=(rows + 0.1, -2.3), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "blue: not at all; orange: by how much the update changes when only this changes, relative to its length;\n"
        "–: there is nothing to measure, or no change that leaves the rest alone",
        fontsize=7, loc="left",
    )  # fmt: skip
    return saved(figure, path)


def percent(value: float) -> str:
    """A relative change."""
    if value > 99:
        return "> 9900 %"
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1g} %"
