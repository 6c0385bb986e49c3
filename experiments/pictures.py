"""Pictures of a run: its curves, and what the first layer has come to look for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def curves(history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Training loss and test accuracy against epochs."""
    epochs = [line["epoch"] for line in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title)
    left.plot(epochs, [line["train_loss"] for line in history], marker=".", label="train")
    left.plot(epochs, [line["test_loss"] for line in history], marker=".", label="test")
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    left.legend(frameon=False)
    accuracies = [100 * line["test_accuracy"] for line in history]
    right.plot(epochs, accuracies, marker=".", color="tab:green")
    right.annotate(
        f"{accuracies[-1]:.2f} %",
        (epochs[-1], accuracies[-1]),
        xytext=(-4, -26),
        textcoords="offset points",
        ha="right",
    )
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def receptive_fields(
    model: nn.Module, shape: tuple[int, int, int], title: str, path: Path, most: int = 64
) -> Path | None:
    """The weights of the first layer that sees the image, one tile a neuron, each on a scale of its own."""
    weight = next((p for p in model.parameters() if p.ndim > 1), None)
    if weight is None:
        return None
    fields = weight.detach().float().cpu()
    if fields.ndim == 2 and fields.shape[1] == math.prod(shape):
        fields = fields.view(-1, *shape)
    if fields.ndim != 4 or fields.shape[1] != shape[0]:
        return None
    fields = fields[:most]
    columns = math.ceil(math.sqrt(len(fields)))
    rows = math.ceil(len(fields) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(0.6 * columns, 0.6 * rows + 0.5), squeeze=False)
    figure.suptitle(title, fontsize=9)
    for axes in grid.flat:
        axes.axis("off")
    for axes, field in zip(grid.flat, fields, strict=False):
        axes.imshow(_image(field), cmap="RdBu_r", vmin=-1, vmax=1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def neurons(history: list[dict[str, Any]], wins: dict[str, Tensor], title: str, path: Path) -> Path | None:
    """For each layer: how its neurons' weight vectors grow, and how the events are shared out among its neurons.

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
        above.fill_between(epochs, least, most, alpha=0.25, linewidth=0)
        above.plot(epochs, mean, marker=".")
        above.set(xlabel="epoch", ylabel="‖w‖: mean, range")
        above.set_title(name, fontsize=9)
        above.xaxis.set_major_locator(MaxNLocator(integer=True))
        share = (100 * wins[name]).sort(descending=True).values.tolist()
        dead = share.count(0)
        below.bar(range(len(share)), share, width=1.0, color="tab:green")
        below.axhline(100 / len(share), color="grey", linewidth=0.8, linestyle="--")
        below.set(xlabel=f"neuron, by rank ({dead} of {len(share)} never win)", ylabel="events won (%)")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.label.set_size(8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _image(field: Tensor) -> Any:
    """Grey level (or colour) 0 in the middle of the scale."""
    field = field / field.abs().max().clamp(min=1e-12)
    return (field + 1).div(2).permute(1, 2, 0).numpy() if len(field) == 3 else field.mean(0).numpy()
