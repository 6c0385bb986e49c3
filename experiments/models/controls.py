"""Controls: networks whose trunk learns nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bioopt import Homeostasis, find_synapses


def random_trunk(model: nn.Module, lr: float | None = None, **options: Any) -> torch.optim.Optimizer:
    """The control for rules that train a trunk: only the last layer learns.

    The difference between a local rule and this control is what the rule's trunk has learned, because their readouts
    learn in the same way.

    Args:
        model: the network.
        lr: as ``readout_lr`` of a local rule with ``readout="delta"``: of SGD by the readout's gradient, or ``None`` to
            learn on standardised presynaptic activity.
        options: of SGD, such as ``momentum``.
    """
    readout = find_synapses(model)[-1].layer
    optimizer: torch.optim.Optimizer
    if lr is None:
        optimizer = Homeostasis(model, lr=0, readout_layer=readout, **options)
    else:
        optimizer = torch.optim.SGD(readout.parameters(), lr=lr, **options)
    model.requires_grad_(False)
    readout.requires_grad_(True)
    return optimizer
