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
NO, YES, UNKNOWN = "#D3ECFA", "#E69F00", "#FFFFFF"  # of Okabe and Ito: everyone can tell blue from orange


def table(cards: Mapping[str, Mapping[str, float]], families: Mapping[str, str], title: str, path: Path) -> Path:
    """A row for each rule, a column for each measure: blue where the trunk's updates do not depend on it.

    Args:
        cards: for each rule, the largest value of each measure in its trunk; those that were not measured are missing.
        families: of the rules, which stand together.
        title: above the table.
        path: where to write it.
    """
    columns, width = places({measure: i for i, group in enumerate(COLUMNS) for measure in group}, 0.25)
    rows, height = places(families, 0.35)
    figure, axes = plt.subplots(figsize=(2.6 + 0.72 * width, 1.3 + 0.25 * height), layout="constrained")
    axes.set_title(f"{title}: does a hidden layer's update depend on ...", fontsize=10, loc="left")
    for rule, y in rows.items():
        for measure, x in columns.items():
            value = cards[rule].get(measure)
            colour, text = (UNKNOWN, "–") if value is None else (YES, relative(value)) if value else (NO, "no")
            axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, facecolor=colour, edgecolor="lightgrey", lw=0.5))
            axes.text(x + 0.5, y + 0.53, text, ha="center", va="center", fontsize=7)
    for group, head in zip(COLUMNS, HEADS, strict=True):
        middle = sum(columns[measure] + 0.5 for measure in group) / len(group)
        axes.text(middle, -1.75, head, ha="center", va="bottom", fontsize=8, fontweight="bold")
        for measure, name in group.items():
            axes.text(columns[measure] + 0.5, -0.1, name, ha="center", va="bottom", fontsize=7, linespacing=0.95)
    axes.set_yticks([y + 0.5 for y in rows.values()], [rule.replace("_", " ") for rule in rows], fontsize=8)
    axes.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.1, -2.3), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "blue: not at all; orange: by how much the update changes when only this changes, relative to its length;\n"
        "–: there is nothing to measure, or no change that leaves the rest alone",
        fontsize=7, loc="left",
    )  # fmt: skip
    return saved(figure, path)


def places(groups: Mapping[str, object], gap: float) -> tuple[dict[str, float], float]:
    """Places one after another, with a gap between groups, and where they end."""
    found: dict[str, float] = {}
    end, last = 0.0, object()
    for name, group in groups.items():
        end += gap if found and group != last else 0.0
        found[name], last = end, group
        end += 1
    return found, end


def relative(value: float) -> str:
    """A relative change: in percent, or as a factor."""
    if value >= 10:
        return f"{value:.0f}×"
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1g} %"
