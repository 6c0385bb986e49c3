"""Pictures of a run: its curves, and the receptive fields of its first layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

SIGNED: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}


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
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.set_title(f"{accuracies[-1]:.2f} %", loc="right", fontsize=10)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    uncluttered(left, right)
    return saved(figure, path)


def receptive_fields(
    start: Tensor | None, end: Tensor | None, share: Tensor | None, shape: tuple[int, int, int], title: str, path: Path
) -> Path | None:
    """The weights of the first layer, if it sees the image, before and after learning; see `draw_fields`.

    Args:
        start: the weights before the first step.
        end: those of the trained network.
        share: of events, that each neuron wins; ``None`` where it was not measured.
        shape: of an image.
        title: above the picture.
        path: where to write it.
    """
    if end is None or _as_images(end, shape) is None:
        return None
    neurons = min(len(end), MOST_FIELDS)
    columns = min(neurons, 16 if neurons > 16 else 8)
    height = math.ceil(neurons / columns) * FIELDS_HEIGHT
    figure, axes = plt.subplots(figsize=(max(0.55 * (columns + 1.2), 0.075 * len(title)), 0.55 * height + 0.55))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.5 / figure.get_figheight())
    note = draw_fields(axes, {"start": start, "end": end}, share, shape, columns)
    figure.suptitle(f"{title}\n{note}", fontsize=9, y=1 - 0.08 / figure.get_figheight(), va="top")
    return saved(figure, path)


MOST_FIELDS = 64  # in a picture
FIELDS_HEIGHT = 2.75  # of a row of neurons, in tiles: two states, and a line of text


def draw_fields(
    axes: Axes, states: dict[str, Tensor | None], share: Tensor | None, shape: tuple[int, int, int], columns: int
) -> str:
    """A column of tiles for each neuron, one for each state of its weights, and below it the share of events it wins.

    Neurons are sorted by that share, and those that never win are framed in red. Of more than `MOST_FIELDS`, some are
    drawn, at equal distances in this order. Each tile has a scale of its own.

    Args:
        axes: to draw in.
        states: the weights of all neurons, by a name that is written beside the tiles.
        share: of events, that each neuron wins; ``None`` where it was not measured.
        shape: of an image.
        columns: neurons in a row.

    Returns:
        A sentence that explains what was drawn.
    """
    fields = {name: _as_images(weights, shape) for name, weights in states.items() if weights is not None}
    neurons = min(len(images) for images in fields.values() if images is not None)
    order = torch.arange(neurons) if share is None else share.argsort(descending=True, stable=True)
    if neurons > MOST_FIELDS:
        order = order[torch.linspace(0, neurons - 1, MOST_FIELDS).round().long()]
    tile, text = 0.93, 0.45
    height = len(fields) + text + 0.3
    for place, neuron in enumerate(order.tolist()):
        row, column = divmod(place, columns)
        dead = share is not None and share[neuron] == 0
        for line, (name, images) in enumerate(fields.items()):
            x, y = column, row * height + line
            assert images is not None
            axes.imshow(_image(images[neuron]), extent=(x, x + tile, y + tile, y), interpolation="nearest", **SIGNED)
            frame: dict[str, Any] = (
                {"edgecolor": "red", "linewidth": 1.6} if dead else {"edgecolor": "lightgrey", "linewidth": 0.5}
            )
            axes.add_patch(Rectangle((x, y), tile, tile, fill=False, **frame))
            if not column:
                axes.text(-0.1, y + tile / 2, name, ha="right", va="center", fontsize=8)
        if share is not None:
            won = 100 * float(share[neuron])
            label = "never" if dead else f"{won:.2g} %" if won >= 0.1 else "< 0.1 %"
            axes.text(column + tile / 2, row * height + len(fields) + 0.05, label, ha="center", va="top", fontsize=7,
                      color="red" if dead else "dimgrey")  # fmt: skip
    axes.set(xlim=(-1.2, columns), ylim=(math.ceil(len(order) / columns) * height, -0.05), aspect="equal")
    axes.axis("off")
    drawn = f"{len(order)} of {neurons:,} neurons" if len(order) < neurons else f"{neurons} neurons"
    if share is None:
        return drawn
    never = int((share == 0).sum())
    which = f"red: the {never} that never {'are' if never > 1 else 'is'}" if never else "each is at times"
    return f"{drawn}, sorted by how often each is the most active; {which}"


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
        above.fill_between(epochs, least, most, alpha=0.25, linewidth=0)
        above.plot(epochs, mean, marker=".")
        above.set(xlabel="epoch", ylabel="‖w‖: mean, range")
        above.set_title(f"layer {name}", fontsize=9)
        above.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        share = (100 * wins[name]).sort(descending=True).values.tolist()
        dead = share.count(0)
        below.bar(range(len(share)), share, width=1.0, color="tab:green")
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
    if not quantities:
        return None
    columns = min(3, len(quantities))
    rows = math.ceil(len(quantities) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axes, quantity in zip(grid.flat, quantities, strict=False):
        for name in (name for name in names if name.startswith(f"{quantity}/")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1, label=name.split("/", 1)[1])
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
    for one in found:
        for axes, values in zip(panels, (one.energy, one.residual), strict=True):
            axes.plot(values, marker=".", markersize=3, linewidth=1, label=f"nudge {one.nudge:g}")
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
    for colour, part in (("tab:red", [p for p in zip(delays, changes, strict=True) if p[0] >= 0]),
                         ("tab:blue", [p for p in zip(delays, changes, strict=True) if p[0] < 0])):  # fmt: skip
        axes.plot(*zip(*part, strict=True), marker=".", markersize=3, linewidth=1, color=colour)
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
    return _tiles(shown, min(8, len(images)), 1.0, title, path, gap=0.25, captions=captions, cmap="Greys")


def fields_over_time(
    snapshots: list[Tensor], shape: tuple[int, int, int], title: str, path: Path, most: int = 12
) -> Path | None:
    """The weights of some neurons of the first layer at the start and after each epoch, a row for each neuron."""
    if not snapshots:
        return None
    epochs = sorted({round(i * (len(snapshots) - 1) / max(1, most - 1)) for i in range(most)})
    shown = [fields for epoch in epochs if (fields := _as_images(snapshots[epoch], shape)) is not None]
    if not shown:
        return None
    captions = [f"epoch {epoch}" if epoch else "start" for epoch in epochs]
    images = [_image(field) for neuron in zip(*shown, strict=True) for field in neuron]
    return _tiles(images, len(shown), 0.65, title, path, captions=captions, **SIGNED)


def _tiles(
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
    tiles = F.pad(images.reshape(-1, *shape).float().mean(1), (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(row), 1) for row in tiles.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[1] - rows[-1].shape[1]))
    return torch.cat(rows).cpu().numpy()


def first_weights(model: nn.Module, most: int | None = None) -> Tensor | None:
    """A copy of the weights of the first layer, or of some of its neurons, on the CPU."""
    weight = next((p for p in model.parameters() if p.ndim > 1), None)
    return None if weight is None else weight[:most].detach().float().cpu().clone()


def _as_images(weights: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """Weights of a layer that sees the image, as N×C×H×W; ``None`` for other layers."""
    if weights is not None and weights.ndim == 2 and weights.shape[1] == math.prod(shape):
        return weights.view(-1, *shape)
    return weights if weights is not None and weights.ndim == 4 and weights.shape[1] == shape[0] else None


def uncluttered(*many: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Draw a faint grid, and no frame above and to the right."""
    for axes in many:
        axes.grid(axis=grid, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def saved(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and close it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _image(field: Tensor) -> Any:
    """A field as grey levels or colours, with 0 in the middle of the scale."""
    field = field / field.abs().max().clamp(min=1e-12)
    return (field + 1).div(2).permute(1, 2, 0).numpy() if len(field) == 3 else field.mean(0).numpy()
