"""What pictures of networks that learn in time side by side share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..pictures import BLUE, ORANGE, style

if TYPE_CHECKING:
    from .side_by_side import SideBySide

#: label, colour and line of each learner
STYLES = {
    "eprop": ("e-prop", BLUE, "-"),
    "random": ("e-prop, random feedback", BLUE, "--"),
    "bptt": ("backpropagation through time", "black", "-"),
    "lif": ("e-prop, no adaptation", ORANGE, "-"),
    "frozen": ("recurrent layer frozen", "grey", "-"),
}


def learning(task: SideBySide, history: list[dict[str, Any]], title: str, scale: float = 1) -> tuple[Figure, Axes]:
    """A figure of what was measured of each learner, times ``scale``, against steps of training."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    figure.suptitle(title)
    steps = [line["steps"] for line in history]
    for name in task.learners:
        label, colour, line = STYLES[name]
        axes.plot(steps, [scale * one[name] for one in history], linestyle=line, **style(colour), label=label)
    return figure, axes
