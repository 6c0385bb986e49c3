"""Controls: networks whose trunk learns nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bioopt import find_synapses


def random_trunk(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """The control for rules that train a trunk: only the last layer learns, by SGD.

    A local rule with ``readout="delta"`` trains its readout in the same way: the difference between the two is what its
    trunk has learned.
    """
    readout = find_synapses(model)[-1]
    model.requires_grad_(False)
    readout.layer.requires_grad_(True)
    return torch.optim.SGD(readout.layer.parameters(), lr=lr, **options)
