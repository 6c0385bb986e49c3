"""Ranges of options, and the error for one out of its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

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
