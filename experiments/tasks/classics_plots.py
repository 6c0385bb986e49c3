"""Picture of `classics`: one page, a row for each result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from ..pictures import BLUE, SIGNED, VERMILION, in_rows, saved, uncluttered

LEARNED, BEFORE, CONTROL = VERMILION, "lightgrey", BLUE
Drawn = Mapping[str, Tensor]


def page(
    drawn: Mapping[str, Drawn], numbers: Mapping[str, float], others: Sequence[str], title: str, path: Path
) -> Path:
    """A row for each part that was run.

    Args:
        drawn: the tensors of each part.
        numbers: what was measured, by the part's name and its own.
        others: the names of the rules that are compared on the bars.
        title: above the page.
        path: where to write it.
    """
    rows: list[tuple[float, dict[str, tuple[float, Callable[[Any, Drawn], None]]]]] = [
        (2.4, {
            "oja": (1, lambda figure, of: _components(figure, of, "Oja: all neurons learn the first component")),
            "sanger": (1.6, lambda figure, of: _components(figure, of, "Sanger: neuron k learns component k")),
        }),
        (2.3, {"bcm_patterns": (1, lambda figure, of: _patterns(figure, of, numbers))}),
        (2.7, {"bcm_orientations": (1, lambda figure, of: _orientations(figure, of))}),
        (2.8, {"bars": (1, lambda figure, of: _bars(figure, of, numbers, others))}),
    ]  # fmt: skip
    shown = [(height, {name: row[name] for name in row if name in drawn}) for height, row in rows]
    shown = [(height, row) for height, row in shown if row]
    heights = [height for height, _ in shown]
    with plt.rc_context({"font.size": 8, "axes.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False}):
        figure = plt.figure(figsize=(9.5, sum(heights) + 0.3), layout="constrained")
        figure.suptitle(title, fontsize=9)
        for line, (_, row) in zip(figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0], shown,
                                  strict=True):  # fmt: skip
            places = line.subfigures(1, len(row), width_ratios=[width for width, _ in row.values()], squeeze=False)[0]
            for place, (name, (_, draw)) in zip(places, row.items(), strict=True):
                draw(place, drawn[name])
        return saved(figure, path)


def _heading(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=9.5, fontweight="bold", x=0.01, ha="left")


def _components(figure: Any, of: Drawn, heading: str) -> None:
    """Weights below the eigenvectors that they should reach, and below them their cosines."""
    _heading(figure, heading)
    above, below = figure.subplots(2, 1, height_ratios=[1.5, 1], sharex=False)
    both, count = torch.cat([of["eigenvectors"], of["weight"]]), len(of["weight"])
    _mosaic(above, both, count, **SIGNED)
    side = int(both.shape[1] ** 0.5) + 1
    above.set_yticks([side * 0.5, side * 1.5], ["eigenvector", "neuron"])
    above.tick_params(length=0)
    places = np.arange(count)
    below.bar(places - 0.2, of["before"].numpy(), 0.36, color=BEFORE, label="before")
    below.bar(places + 0.2, of["cosines"].numpy(), 0.36, color=LEARNED, label=f"after: ≥ {of['cosines'].min():.4f}")
    below.set_xticks(places, [f"{100 * share:.0f} %" for share in of["share"]])
    below.set(ylabel="|cosine|", ylim=(0, 1.6), yticks=[0, 0.5, 1], xlabel="variance of the component")
    below.legend(ncols=2, loc="upper left")
    uncluttered(below, grid="y")


def _patterns(figure: Any, of: Drawn, numbers: Mapping[str, float]) -> None:
    """The response to each pattern over the steps, and at both ends."""
    _heading(figure, "BCM: a neuron becomes selective for one of several patterns")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    course = of["course"].numpy()
    steps = np.linspace(0, int(of["steps"]), len(course))
    chosen = int(course[-1].argmax())
    for pattern, responses in enumerate(course.T):
        colour, width = (LEARNED, 1.8) if pattern == chosen else ("grey", 0.8)
        left.plot(steps, responses, color=colour, linewidth=width)
    left.set_xlabel("step")
    left.set_ylabel("response to each pattern")
    places = np.arange(course.shape[1])
    right.bar(places - 0.2, course[0] / course[0].max(), 0.4, color=BEFORE,
              label=f"before: selectivity {numbers['bcm_patterns_selectivity_before']:.2f}")  # fmt: skip
    right.bar(places + 0.2, course[-1] / course[-1].max(), 0.4, color=LEARNED,
              label=f"after: {numbers['bcm_patterns_selectivity']:.3f}, "
                    f"at most {numbers['bcm_patterns_selectivity_at_most']:.3f}")  # fmt: skip
    right.set_ylim(min(-0.1, float(right.get_ylim()[0])), 1.5)
    right.set_yticks([0, 0.5, 1])
    right.set_xlabel("pattern")
    right.set_ylabel("response / largest")
    right.legend(loc="upper left")
    uncluttered(left, right)


def _orientations(figure: Any, of: Drawn) -> None:
    """Receptive fields, their tuning curves, and the index with both controls."""
    _heading(figure, "BCM: neurons become selective for orientation, from whitened patches")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.35, 1.3, 1])
    _mosaic(left, of["fields"][:24], 6, **SIGNED)
    left.set_yticks([])
    left.set_xlabel(f"weights of {min(24, len(of['fields']))} neurons")
    degrees = np.arange(of["tuning"].shape[1]) * (180 / of["tuning"].shape[1])
    for curve in of["tuning"][:8]:
        middle.plot(degrees, (curve / curve.max().clamp(min=1e-12)).numpy(), linewidth=1.2)
    middle.set_xticks([0, 45, 90, 135, 180])
    middle.set_xlabel(f"orientation of the grating (°), {min(8, len(of['tuning']))} neurons")
    middle.set_ylabel("response / largest")
    kinds = {
        "index_before": ("random", BEFORE),
        "index_noise": ("noise", CONTROL),
        "index_learned": ("patches", LEARNED),
    }
    for place, (name, (_, colour)) in enumerate(kinds.items()):
        index = of[name]
        spread = np.linspace(-0.25, 0.25, len(index)) if len(index) > 1 else np.zeros(1)
        right.plot(
            place + spread, index, "o", color=colour, markersize=3.5, markeredgecolor="grey", markeredgewidth=0.3
        )
        median = float(index.median())
        right.plot([place - 0.35, place + 0.35], [median, median], color="black", linewidth=1.2)
        right.annotate(f"{median:.2f}", (place, 1.02), ha="center")
    right.set_xticks(range(3), [label for label, _ in kinds.values()])
    right.set_ylim(0, 1.12)
    right.set_ylabel("orientation index")
    right.set_xlabel("learned from; line: median")
    uncluttered(middle)
    uncluttered(right, grid="y")


def _bars(figure: Any, of: Drawn, numbers: Mapping[str, float], others: Sequence[str]) -> None:
    """Images, weights, and the number of bars found over the presentations and by other rules."""
    _heading(figure, "Földiák: a neuron for each bar, from images of several bars")
    left, middle, right, last = figure.subplots(1, 4, width_ratios=[0.62, 1.25, 1.2, 0.9])
    grey: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 1}
    _mosaic(left, of["images"], 2, **grey)
    left.set_yticks([])
    left.set_xlabel("images")
    _mosaic(middle, of["fields"], int(len(of["fields"]) ** 0.5), **grey)
    middle.set_yticks([])
    middle.set_xlabel("weights")
    presented, bars = of["course"].T.numpy()
    right.plot(presented, bars, color=LEARNED, linewidth=1.5)
    right.axhline(numbers["bars_of"], color="grey", linestyle="--", linewidth=0.8)
    right.set_xlabel("images seen")
    right.set_ylabel(f"bars found, of {numbers['bars_of']:.0f}")
    right.set_ylim(0, 1.12 * numbers["bars_of"])
    names = ["Földiák", *(name.replace("_", "\n") for name in others)]
    values = [numbers["bars_found"], *of["others"].tolist()]
    drawn = last.bar(range(len(values)), values, color=[LEARNED, *[CONTROL] * len(others)])
    last.bar_label(drawn, fmt="%.0f")
    last.set_xticks(range(len(names)), names, fontsize=6.5)
    last.set_ylim(0, 1.12 * numbers["bars_of"])
    uncluttered(right, last, grid="y")


def _mosaic(axes: Axes, fields: Tensor, columns: int, **options: Any) -> None:
    """Square fields, row by row, each with a scale of its own, and a white margin between them."""
    side = int(fields.shape[1] ** 0.5)
    scaled = fields / fields.abs().amax(1, keepdim=True).clamp(min=1e-12)
    framed = F.pad(scaled.view(-1, side, side), (0, 1, 0, 1), value=math.nan)
    axes.imshow(in_rows(framed, columns, math.nan)[:-1, :-1].numpy(), **options)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
