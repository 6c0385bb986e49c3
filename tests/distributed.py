"""Carry a model and its optimizer over by `torch.distributed.checkpoint`, apart, since importing that takes time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


def by_distributed_checkpoint(
    models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], way: str, folder: Path
) -> None:
    """Carry the first model and its optimizer over to the second, by `torch.distributed.checkpoint`.

    ``way``: ``"nested"`` or ``"flat"``, in memory, or ``"saved"``, by files.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=way == "flat")
    state = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0], options=options))
    models[1].load_state_dict(models[0].state_dict())
    if way == "saved":
        save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
        loaded = {"optimizer": get_optimizer_state_dict(models[1], optimizers[1])}
        load(loaded, checkpoint_id=folder, no_dist=True)
        state = loaded["optimizer"]
    set_optimizer_state_dict(models[1], optimizers[1], state, options=options)
