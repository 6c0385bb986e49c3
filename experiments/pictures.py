"""The style of all pictures, and those that every run has.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, each with a marker of its own, by which
lines differ in black and white too. Each picture is written as PNG, and as PDF for papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from cycler import cycler
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)  # without yellow, which is faint on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")  # more than colours: places that share one differ
SIGNED: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.formatter.useoffset": False,  # each number on an axis is whole
        "pdf.fonttype": 42,  # text that can be edited
        "lines.markersize": 4,
    }
)


class PlainLogFormatter(LogFormatter):
    """The ticks of a logarithmic axis as plain numbers: 0.6 beside 2, not 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a tick; empty where the axis has too many."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def style(place: int | str) -> dict[str, Any]:
    """Colour and marker of a line: by its place among others, or by its colour."""
    if isinstance(place, int):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    else:
        known = {**dict(zip(COLOURS, MARKERS, strict=False)), "black": "|", "dimgrey": "+", "grey": "x"}
        colour, marker = place, known[place]
    return {"color": colour, "marker": marker}


def curves(history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Training loss and test accuracy against epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title)
    accuracies = [100 * line["test_accuracy"] for line in history]
    losses = {name: [line[f"{name}_loss"] for line in history] for name in ("train", "test")}
    right.set_title(f"{accuracies[-1]:.2f} %", loc="right", fontsize=10)
    if len(history) == 1:  # there is no course to draw
        last = {name: loss[0] for name, loss in losses.items()}
        for axes, values in ((left, last), (right, {"test": accuracies[0]})):
            bars = axes.bar(list(values), list(values.values()), 0.5, color=COLOURS[: len(values)])
            axes.bar_label(bars, fmt="%.4g", fontsize=9)
            axes.set_xlim(-1, len(values))
            axes.set_xlabel(f"after epoch {history[0]['epoch']}")
        left.set(ylabel="loss", ymargin=0.15)
        right.set(ylabel="accuracy (%)", ylim=(0, 105))
        uncluttered(left, right, grid="y")
        return saved(figure, path)
    epochs = [line["epoch"] for line in history]
    for place, (name, loss) in enumerate(losses.items()):
        left.plot(epochs, loss, **style(place), label=name)
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter(PlainLogFormatter())
    left.yaxis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(1.5, 0.5)))
    left.legend(frameon=False)
    right.plot(epochs, accuracies, **style(GREEN))
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    uncluttered(left, right)
    return saved(figure, path)


def neurons(history: list[dict[str, Any]], wins: dict[str, Tensor], title: str, path: Path) -> Path | None:
    """For each layer: the norms of its neurons' weight vectors, and how often each neuron is the most active.

    Args:
        history: lines of a run with ``weight_norms``, ``{layer: [least, mean, most]}``.
        wins: for each layer, the share of events that each of its neurons wins.
        title: above the picture.
        path: where to write it.
    """
    layers = [name for name in wins if len(wins[name]) > 1]
    if not layers or not history:
        return None
    figure, grid = plt.subplots(
        2, len(layers), figsize=(max(4.5, 2.8 * len(layers)), 4.6), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    epochs = [line["epoch"] for line in history]
    for (above, below), name in zip(grid.T, layers, strict=True):
        least, mean, most = zip(*(line["weight_norms"][name] for line in history), strict=True)
        if len(epochs) == 1:  # a band of one epoch has no width
            above.errorbar(epochs, mean, [[mean[0] - least[0]], [most[0] - mean[0]]], fmt="o", color=BLUE, capsize=4)
            above.set_xlim(epochs[0] - 1, epochs[0] + 1)
        else:
            above.fill_between(epochs, least, most, color=BLUE, alpha=0.25, linewidth=0)
            above.plot(epochs, mean, **style(BLUE))
        above.set(xlabel="epoch", ylabel="‖w‖: mean, range")
        above.set_title(f"layer {name}", fontsize=9)
        above.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        share = (100 * wins[name]).sort(descending=True).values.tolist()
        dead = share.count(0)
        below.bar(range(len(share)), share, width=1.0, color=GREEN)
        below.axhline(100 / len(share), color="grey", linewidth=0.8, linestyle="--")
        below.set(xlabel=f"neuron, by rank ({dead} of {len(share)} never win)", ylabel="events won (%)")
    for axes in grid.flat:
        uncluttered(axes)
        axes.xaxis.label.set_size(8)
    return saved(figure, path)


def course(lines: list[dict[str, Any]], title: str, path: Path) -> Path | None:
    """The measurements of `diagnostics.Diagnostics` against steps: a panel for each quantity, a line for each layer.

    Args:
        lines: ``{"step": step, "<quantity>/<layer>": value, ...}`` each.
        title: above the picture.
        path: where to write it.
    """
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    quantities = list(dict.fromkeys(name.split("/")[0] for name in names))
    layers = list(dict.fromkeys(name.split("/", 1)[1] for name in names))  # each has one colour in all panels
    if not quantities:
        return None
    columns = min(3, len(quantities))
    rows = math.ceil(len(quantities) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axes, quantity in zip(grid.flat, quantities, strict=False):
        for name in (name for name in names if name.startswith(f"{quantity}/")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            layer = name.split("/", 1)[1]
            axes.plot(*zip(*points, strict=True), **style(layers.index(layer)), linewidth=1, label=layer)
        axes.set(xlabel="step", title=quantity.replace("_", " "))
        positive = any(y > 0 for line in axes.lines for y in line.get_ydata())
        if positive and quantity in ("signal_to_noise", "update_ratio"):
            axes.set_yscale("log", nonpositive="mask")
        elif quantity.endswith("_angle"):
            axes.axhline(90, color="grey", linewidth=0.8, linestyle="--")  # nothing in common
            axes.set(ylim=(0, 135), yticks=[0, 45, 90, 135], ylabel="degrees")
        elif quantity not in ("cosine", "free_energy"):
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)
        uncluttered(axes)
    for axes in grid.flat[len(quantities) :]:
        axes.axis("off")
    return saved(figure, path)


def relaxations(found: list[Any], title: str, path: Path) -> Path | None:
    """The free energy and its residual against steps of relaxation, a line for each `bioopt.energy.base.Relaxation`."""
    found = [one for one in found if one.energy]
    if not found:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    figure.suptitle(title)
    for place, one in enumerate(found):
        for axes, values in zip(panels, (one.energy, one.residual), strict=True):
            axes.plot(values, **style(place), linewidth=1, label=f"nudge {one.nudge:g}")
    panels[0].set(xlabel="step of relaxation", title="free energy per sample")
    panels[1].set(xlabel="step of relaxation", title="norm of its gradient")
    if any(value > 0 for one in found for value in one.residual):
        panels[1].set_yscale("log", nonpositive="mask")
    panels[0].legend(frameon=False, fontsize=7)
    uncluttered(*panels)
    return saved(figure, path)


def relaxation_course(course: dict[str, dict[int, float]], title: str, path: Path) -> Path | None:
    """The cosine of each layer's update with the gradient against the number of steps of relaxation.

    Args:
        course: of `diagnostics.relaxation_course`, layers from the input to the output.
        title: above the picture.
        path: where to write it.
    """
    if not course:
        return None
    figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    axes.set_title(title, fontsize=9)
    colours = plt.get_cmap("viridis")
    for i, (name, values) in enumerate(course.items()):
        colour = colours(0.95 * i / max(1, len(course) - 1))
        axes.plot(list(values), list(values.values()), marker=".", linewidth=1, color=colour, label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    ticks = sorted({count for values in course.values() for count in values})
    axes.set_xscale("log", base=2)
    axes.set(xlabel="steps of relaxation", ylabel="cosine with backpropagation", ylim=(-0.25, 1.05))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if len(course) <= 12:
        axes.legend(frameon=False, fontsize=7)
    uncluttered(axes)
    return saved(figure, path)


def window(delays: list[float], changes: list[float], title: str, path: Path) -> Path:
    """The change of a weight by a pair of spikes, against their delay in ms (postsynaptic less presynaptic)."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    axes.set_title(title, fontsize=9)
    for colour, part in ((VERMILION, [p for p in zip(delays, changes, strict=True) if p[0] >= 0]),
                         (BLUE, [p for p in zip(delays, changes, strict=True) if p[0] < 0])):  # fmt: skip
        axes.plot(*zip(*part, strict=True), **style(colour), linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="postsynaptic less presynaptic spike (ms)", ylabel="change of the weight / η")
    uncluttered(axes)
    return saved(figure, path)


def confusion(counts: Tensor, title: str, path: Path) -> Path:
    """The confusion matrix, classes by predicted classes; the diagonal is not coloured."""
    classes = len(counts)
    wrong = counts.clone().fill_diagonal_(0)
    written = classes <= 30  # more numbers are unreadable and take seconds
    size = 0.5 * classes + 1.2 if written else 9
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(wrong.numpy(), cmap="Reds")
    for row in range(classes):
        for column in range(classes):
            if written and counts[row, column]:
                bright = wrong[row, column] > 0.6 * wrong.max()
                axes.text(
                    column, row, str(counts[row, column].item()), ha="center", va="center",
                    fontsize=7, color="white" if bright else "black",
                )  # fmt: skip
    ticks = range(0, classes, 1 if written else 10)
    axes.set(xlabel="predicted class", ylabel="class", xticks=ticks, yticks=ticks)
    axes.set_title(f"{title}\n{int(wrong.sum()):,} of {int(counts.sum()):,} wrong", fontsize=9)
    return saved(figure, path)


def misclassified(images: Tensor, labels: Tensor, predicted: Tensor, title: str, path: Path) -> Path | None:
    """Misclassified images N×C×H×W, each with its class and its predicted class."""
    if not len(images):
        return None
    shown = [image.permute(1, 2, 0).squeeze(2).numpy() for image in images]
    captions = [f"{label} → {guess}" for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True)]
    title = f"{title}: class → predicted"
    return tiles(shown, min(8, len(images)), 1.0, title, path, gap=0.25, captions=captions, cmap="Greys")


def tiles(
    images: list[Any], columns: int, side: float, title: str, path: Path, *,
    gap: float = 0.07, captions: Sequence[str] = (), **scale: Any,
) -> Path:  # fmt: skip
    """Images of ``side`` inches, row by row, the first with captions; all in one axes, as many axes take seconds."""
    rows, head, margin = math.ceil(len(images) / columns), 0.5 if captions else 0.3, 0.07
    inner = columns * (side + margin) - margin
    width, height = max(inner + 2 * margin, 0.075 * len(title)), head + rows * (side + gap) - gap + margin
    figure = plt.figure(figsize=(width, height))
    figure.suptitle(title, fontsize=9, y=1 - 0.15 / height, va="center")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = (width - inner) / 2 + column * (side + margin), head + row * (side + gap)
        axes.imshow(image, extent=(x, x + side, y + side, y), **scale)
        if i < len(captions):
            axes.text(x + side / 2, y - 0.03, captions[i], ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return saved(figure, path)


def mosaic(images: Tensor, shape: tuple[int, int, int], columns: int) -> Any:
    """Images N×pixels as one image, row by row, with a margin around each; colours are averaged."""
    return in_rows(F.pad(images.reshape(-1, *shape).float().mean(1), (1, 1, 1, 1), value=0.5), columns).cpu().numpy()


def in_rows(tiles: Tensor, columns: int, empty: float = 0.0) -> Tensor:
    """Tiles N×H×W as one image, row by row, the last of which is filled up with a value."""
    rows = [torch.cat(list(row), 1) for row in tiles.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[1] - rows[-1].shape[1]), value=empty)
    return torch.cat(rows)


def uncluttered(*many: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Draw a faint grid, no frame above and to the right, and on long lines a marker here and there."""
    for axes in many:
        for line in axes.get_lines():
            if (points := np.size(line.get_xdata())) > 20:
                line.set_markevery(points // 10)
        axes.grid(axis=grid, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def saved(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and PDF, and close it; returns the path of the PNG."""
    written(figure, path)
    plt.close(figure)
    return path


def written(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and PDF."""
    figure.savefig(path, dpi=120)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})  # the same figure gives the same file
