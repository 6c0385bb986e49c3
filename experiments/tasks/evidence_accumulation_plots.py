"""The pictures of `evidence_accumulation`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..pictures import BLUE, ORANGE, saved, style, uncluttered

if TYPE_CHECKING:
    from .evidence_accumulation import EvidenceAccumulation

#: label, colour and line of each learner
STYLES = {
    "eprop": ("e-prop", BLUE, "-"),
    "random": ("e-prop, random feedback", BLUE, "--"),
    "bptt": ("backpropagation through time", "black", "-"),
    "lif": ("e-prop, no adaptation", ORANGE, "-"),
    "frozen": ("recurrent layer frozen", "grey", "-"),
}


def curves(task: EvidenceAccumulation, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Accuracy on fresh trials against steps of training."""
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    figure.suptitle(title)
    steps = [line["steps"] for line in history]
    for name in task.learners:
        label, colour, line = STYLES[name]
        axes.plot(steps, [100 * one[name] for one in history], linestyle=line, **style(colour), label=label)
    axes.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"steps of {task.batch_size} trials", ylabel="right answers (%)", ylim=(45, 101))
    uncluttered(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return saved(figure, path)


def trial(inputs: Tensor, activity: Tensor, title: str, path: Path) -> Path:
    """The spikes of one trial: of the inputs, and of the recurrent layer."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), layout="constrained", sharex=True)
    figure.suptitle(title)
    for axes, spikes, label in ((above, inputs, "input neuron"), (below, activity, "recurrent neuron")):
        at, which = spikes.cpu().nonzero().unbind(1)
        axes.scatter(at.numpy(), which.numpy(), s=2, color="black", linewidths=0)
        axes.set(ylabel=label, ylim=(-1, spikes.shape[1]))
        uncluttered(axes)
    below.set_xlabel("time step")
    return saved(figure, path)
