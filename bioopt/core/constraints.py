"""Ranges of options, and the error for one out of its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: whether a value is in range, and the range in words
Constraint: TypeAlias = tuple[Callable[[Any], bool], str]

NON_NEGATIVE: Constraint = (lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")
POSITIVE: Constraint = (lambda v: math.isfinite(v) and v > 0, "a finite number > 0")
POSITIVE_INT: Constraint = (lambda v: isinstance(v, int) and v >= 1, "an integer >= 1")
SEED: Constraint = (lambda v: isinstance(v, int) and v >= 0, "an integer >= 0")
RATE: Constraint = (lambda v: 0 < v <= 1, "a number in (0, 1]")


def one_of(*choices: str | None) -> Constraint:
    """One of these words."""
    return lambda v: v in choices, f"one of {', '.join(map(str, choices))}"


def require_in_range(owner: str, name: str, value: Any, constraint: Constraint) -> None:
    """Raise if an option of a rule or a module is out of its range."""
    holds, range_ = constraint
    try:
        ok = not isinstance(value, bool) and holds(value)
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(f"{owner}: {name}={value!r} must be {range_}")


def require_labels(rule: str, target: Tensor, samples: torch.Size | None, shape: torch.Size, readout: str) -> None:
    """Raise if a target is no class label for each sample.

    Args:
        rule: its name.
        target: that is not activity of the readout's shape.
        samples: the shape of labels; ``None``: the readout has other dimensions than samples and neurons.
        shape: of the readout's activity, neurons last.
        readout: its name.
    """
    if target.shape != samples or target.is_floating_point():
        raise ValueError(
            f"{rule}: target of shape {tuple(target.shape)} and type {target.dtype} must be class labels, one per "
            f"sample, or have the shape {tuple(shape)} of the readout '{readout}'"
        )
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < shape[-1]:
        raise ValueError(f"{rule}: target has labels outside 0 to {shape[-1] - 1}, the neurons of '{readout}'")
