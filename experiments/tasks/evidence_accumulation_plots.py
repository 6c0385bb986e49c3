"""The pictures of `evidence_accumulation`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..pictures import BLUE, VERMILION, saved, uncluttered
from .side_by_side_plots import STYLES, learning

if TYPE_CHECKING:
    from .evidence_accumulation import EvidenceAccumulation


def curves(task: EvidenceAccumulation, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Accuracy on fresh trials against steps of training."""
    figure, axes = learning(task, history, title, scale=100)
    axes.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"steps of {task.batch_size} trials", ylabel="right answers (%)")
    axes.set_ylim(min(45, axes.get_ylim()[0]), 101)
    uncluttered(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return saved(figure, path)


def credit(
    task: EvidenceAccumulation, history: list[dict[str, Any]], over_time: dict[str, Tensor], title: str, path: Path
) -> Path:
    """How far e-prop agrees with backpropagation: its estimates as learning goes on, and within trials after it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    figure.suptitle(title)
    steps = [line["steps"] for line in history]
    for name, cosine in over_time.items():
        label, colour, line = STYLES[name]
        for layer, marker in (("enter", "."), ("recurrent", "x")):
            values = [one[f"{name}_cosine_{layer}"] for one in history]
            of = "input" if layer == "enter" else "recurrent"
            left.plot(steps, values, line, color=colour, marker=marker, label=f"{label}: {of} synapses")
        right.plot(cosine.cpu().numpy(), line, color=colour, linewidth=1)
    begin, end = task.cues * (task.cue + task.pause), len(cosine) - task.answer
    right.axvspan(begin, end, color="grey", alpha=0.15, linewidth=0)
    right.text((begin + end) / 2, -0.95, "delay", ha="center", color="grey")
    left.set(
        xlabel=f"steps of {task.batch_size} trials", ylabel="cosine, e-prop to backpropagation", ylim=(-1.02, 1.02)
    )
    right.set(xlabel="time step of a trial: what reaches the neurons' input currents")
    for axes in (left, right):
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        uncluttered(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return saved(figure, path)


def trial(
    inputs: Tensor, activity: Tensor, membranes: Tensor, thresholds: Tensor, title: str, path: Path, traced: int = 3
) -> Path:
    """One trial, steps × neurons each: all spikes, and membranes and thresholds of the neurons that fire most."""
    heights = [3, 3, *[1.2] * traced]
    figure, (above, below, *rows) = plt.subplots(
        2 + traced, 1, figsize=(7, 7.5), layout="constrained", sharex=True, height_ratios=heights
    )
    figure.suptitle(title)
    for axes, spikes, label in ((above, inputs, "input neuron"), (below, activity, "recurrent neuron")):
        at, which = spikes.cpu().nonzero().unbind(1)
        axes.scatter(at.numpy(), which.numpy(), s=2, color="black", linewidths=0)
        axes.set(ylabel=label, ylim=(-1, spikes.shape[1]))
    for axes, neuron in zip(rows, activity.sum(0).topk(traced).indices.tolist(), strict=True):
        axes.plot(membranes[:, neuron].cpu().numpy(), color=BLUE, linewidth=0.9, label="membrane potential")
        axes.plot(thresholds[:, neuron].cpu().numpy(), color=VERMILION, linewidth=0.9, label="threshold")
        axes.set(ylabel=f"neuron {neuron}")
    for axes in (above, below, *rows):
        uncluttered(axes)
    rows[0].legend(frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95), borderpad=0)
    rows[-1].set_xlabel("time step")
    return saved(figure, path)
