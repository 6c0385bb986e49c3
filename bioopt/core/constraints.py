"""Ranges of options, and the error for one out of its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import is_captured

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


def require_labels(
    rule: str,
    target: Tensor,
    samples: torch.Size | None,
    classes: int,
    readout: str,
    shape: torch.Size | None = None,
    more: str = "",
) -> None:
    """Raise if a target is no class label for each sample.

    Args:
        rule: its name.
        target: to be checked.
        samples: the shape of labels; ``None``: the readout has other dimensions than samples and neurons.
        classes: their number.
        readout: its name.
        shape: of the readout's activity, if a target may have that too.
        more: the way out where labels are out of range.
    """
    if target.shape != samples or target.is_floating_point() or target.is_complex():
        other = f", or have the shape {tuple(shape)} of the readout '{readout}'" if shape is not None else ""
        raise ValueError(
            f"{rule}: target of shape {tuple(target.shape)} and type {target.dtype} must be class labels, one integer "
            f"for each sample{other}"
        )
    if is_captured([target]) or not target.numel():
        return
    low, high = int(target.min()), int(target.max())
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"{rule}: target has the labels {low} to {high}, outside 0 to {classes - 1}, the neurons of "
            f"'{readout}'{more}"
        )
