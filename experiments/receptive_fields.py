"""Receptive fields: the weights of the first layer as pictures, before, during and after learning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from .pictures import SIGNED, VERMILION, in_rows, saved, tiles

MOST_FIELDS = 64  # in a picture
SHADES = 9  # of an animation: an odd number, so that one of them is 0
FIELDS_HEIGHT = 2.75  # of a row of neurons, in tiles: two states, and a line of text


def before_and_after(
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


def draw_fields(
    axes: Axes, states: dict[str, Tensor | None], share: Tensor | None, shape: tuple[int, int, int], columns: int
) -> str:
    """A column of tiles for each neuron, one for each state of its weights, and below it the share of events it wins.

    Neurons are sorted by that share, and those that never win are framed in orange. Of more than `MOST_FIELDS`, some
    are drawn, at equal distances in this order. Each tile has a scale of its own.

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
                {"edgecolor": VERMILION, "linewidth": 1.6} if dead else {"edgecolor": "lightgrey", "linewidth": 0.5}
            )
            axes.add_patch(Rectangle((x, y), tile, tile, fill=False, **frame))
            if not column:
                axes.text(-0.1, y + tile / 2, name, ha="right", va="center", fontsize=8)
        if share is not None:
            won = 100 * float(share[neuron])
            label = "never" if dead else f"{won:.2g} %" if won >= 0.1 else "< 0.1 %"
            axes.text(column + tile / 2, row * height + len(fields) + 0.05, label, ha="center", va="top", fontsize=7,
                      color=VERMILION if dead else "dimgrey")  # fmt: skip
    axes.set(xlim=(-1.2, columns), ylim=(math.ceil(len(order) / columns) * height, -0.05), aspect="equal")
    axes.axis("off")
    drawn = f"{len(order)} of {neurons:,} neurons" if len(order) < neurons else f"{neurons} neurons"
    if share is None:
        return drawn
    never = int((share == 0).sum())
    which = f"orange: the {never} that never {'are' if never > 1 else 'is'}" if never else "each is at times"
    return f"{drawn}, sorted by how often each is the most active; {which}"


def over_time(
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
    return tiles(images, len(shown), 0.65, title, path, captions=captions, **SIGNED)


def first_weights(model: nn.Module, most: int | None = None) -> Tensor | None:
    """A copy of the weights of the first layer, or of some of its neurons, on the CPU."""
    weight = next((p for p in model.parameters() if p.ndim > 1), None)
    return None if weight is None else weight[:most].detach().float().cpu().clone()


def _as_images(weights: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """Weights of a layer that sees the image, as N×C×H×W; ``None`` for other layers."""
    if weights is not None and weights.ndim == 2 and weights.shape[1] == math.prod(shape):
        return weights.view(-1, *shape)
    return weights if weights is not None and weights.ndim == 4 and weights.shape[1] == shape[0] else None


def _image(field: Tensor) -> Any:
    """A field as grey levels or colours, with 0 in the middle of the scale."""
    field = field / field.abs().max().clamp(min=1e-12)
    return (field + 1).div(2).permute(1, 2, 0).numpy() if len(field) == 3 else field.mean(0).numpy()


def animation(snapshots: list[Tensor], shape: tuple[int, int, int], columns: int, path: Path, scale: int = 2) -> Path:
    """Receptive fields while they develop: a GIF that plays forever, and stays at its last picture for two seconds.

    Args:
        snapshots: weights of the first layer, neurons × inputs or as of a convolution, in the order of learning.
        shape: of an image.
        columns: neurons in a row.
        path: where to write it.
        scale: screen pixels for each weight, in both directions.

    Raises:
        ValueError: the layer does not see the image.
    """
    colours = (matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, SHADES))[:, :3] * 255).astype(np.uint8)
    frames = []
    for weights in snapshots:
        fields = _as_images(weights, shape)
        if fields is None:
            raise ValueError(f"weights of shape {tuple(weights.shape)} do not see images of {shape}")
        fields = fields.float().mean(1)
        fields = fields / fields.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
        framed = F.pad(fields, (0, 1, 0, 1), value=0.0)  # a margin in the colour of 0
        shades = ((in_rows(framed, columns) + 1) / 2 * (SHADES - 1)).round().to(torch.uint8)
        frame = Image.fromarray(shades.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
        frame.putpalette(colours.tobytes())
        frames.append(frame)
    durations = [120] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
    return path
