"""Parallel pathways, of which a gate opens a few for each image."""

from __future__ import annotations

import torch
from torch import nn

from bioopt.nn import Gate

from .shapes import Shape


class InContext(nn.Module):
    """A gate that sees the last channels of an image, the context, while its pathways see the other channels.

    Args:
        gate: its pathways take flat images.
        contexts: the number of context channels, each constant over the image.
    """

    def __init__(self, gate: Gate, contexts: int) -> None:
        super().__init__()
        self.gate = gate
        self.contexts = contexts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images N×(C + contexts)×H×W to the gate's output."""
        image, context = x[:, : -self.contexts], x[:, -self.contexts :, 0, 0]
        y: torch.Tensor = self.gate(image.flatten(1).contiguous(), context)  # contiguous once, and not in each pathway
        return y

    def extra_repr(self) -> str:
        """Its option."""
        return f"contexts={self.contexts}"


def gated(
    shape: Shape, classes: int, *, pathways: int, hidden: int, active: int | None, contexts: int = 0
) -> nn.Module:
    """Linear pathways with ReLU, of which a gate opens a few for each image, and a linear readout.

    The readout's input is normalised, so that its scale does not depend on the number of open pathways.

    Args:
        shape: channels, height and width of an image.
        classes: outputs.
        pathways: number of pathways.
        hidden: neurons of each pathway.
        active: number of pathways that an image takes; ``None``: all.
        contexts: number of last channels of the image that are a context, each constant over the image (a one-hot code
            of the task, for example); the gate's controller sees only these, and the pathways only the others. 0: both
            see the image.
    """
    channels, height, wide = shape
    if not 0 <= contexts < channels:
        raise ValueError(
            f"model.contexts={contexts} must be from 0 to {channels - 1}: of {channels} channels, at least one is image"
        )
    inputs = (channels - contexts) * height * wide
    gate = Gate(
        nn.Linear(contexts or inputs, pathways),
        [nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True)) for _ in range(pathways)],
        active=active,
    )
    routed = [InContext(gate, contexts)] if contexts else [nn.Flatten(), gate]
    return nn.Sequential(*routed, nn.BatchNorm1d(hidden, affine=False), nn.Linear(hidden, classes))
