"""Picture of `first_run`: accuracies against epochs, and the filters of each rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..pictures import saved, style, uncluttered
from ..receptive_fields import MOST_FIELDS, draw_fields


def page(
    courses: Mapping[str, Sequence[Sequence[float]]],
    drawn: Mapping[str, Mapping[str, Tensor]],
    control: str,
    shape: tuple[int, int, int],
    title: str,
    path: Path,
) -> Path:
    """Test accuracies on the left; on the right a block of filters for each rule but the control, which has the first.

    Args:
        courses: for each rule and repetition, the test accuracy at the start and after each epoch.
        drawn: for each rule, the weights of the first layer at the start and the end, and the share of events that
            each neuron wins.
        control: the rule that leaves the trunk at random.
        shape: of an image.
        title: above the page.
        path: where to write it.
    """
    shown = [rule for rule in sorted(drawn, key=lambda rule: rule == "sgd") if rule != control]
    neurons = max([min(len(of["end"]), MOST_FIELDS) for of in drawn.values()], default=1)
    rows = math.ceil(neurons / 16)
    height = max(3.0, (1.45 * rows + 0.4) * len(shown)) + 0.3
    figure = plt.figure(figsize=(10.5, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 2.4], squeeze=False)[0]
    axes = left.subplots()
    ranked = sorted(courses, key=lambda rule: -statistics.fmean(course[-1] for course in courses[rule]))
    for place, rule in enumerate(ranked):
        at_epoch = [[100 * accuracy for accuracy in epoch] for epoch in zip(*courses[rule], strict=True)]
        drawn_as = style("grey" if rule == control else place)
        means = list(map(statistics.fmean, at_epoch))
        label = f"{rule.replace('_', ' ')}{' (control)' * (rule == control)}: {means[-1]:.1f} %"
        axes.plot(means, **drawn_as, label=label)
        axes.fill_between(
            range(len(means)), list(map(min, at_epoch)), list(map(max, at_epoch)), color=drawn_as["color"], alpha=0.2,
            linewidth=0,
        )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100), xlim=(0, len(means) - 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right", fontsize=8, handlelength=1, title="mean; band: all repetitions",
                alignment="left")  # fmt: skip
    uncluttered(axes)
    if shown:
        for panel, rule in zip(right.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            of = drawn[rule]
            states: dict[str, Tensor | None] = {"start": of["start"], "end": of["end"]}
            note = draw_fields(panel, states, of["share"], shape, min(16, neurons))
            panel.set_title(f"{rule.replace('_', ' ')}: {note}", fontsize=9, loc="left")
    return saved(figure, path)
