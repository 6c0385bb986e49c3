"""Means, confidence intervals and readable numbers. Imports nothing of ours."""

from __future__ import annotations

import math
import statistics


def interval(values: list[float]) -> float | None:
    """Half the 95 % confidence interval of the mean; ``None`` for a single value, or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.special import stdtrit  # Student's quantile; scipy.stats would take a second to load

    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


def whisker(values: list[float]) -> float | None:
    """The `interval` to be drawn; ``None`` below three values, whose points say more (see `spread`)."""
    return interval(values) if len(values) > 2 else None


def with_interval(name: str, values: list[float]) -> dict[str, float]:
    """A mean by its name, and its 95 % confidence interval where there is one."""
    half = interval(values)
    return {name: statistics.fmean(values)} | ({} if half is None else {f"{name}_ci95": half})


def percent(values: list[float], sign: str = "") -> str:
    """The mean of fractions in percent, with its spread."""
    if not values:
        return ""
    return f"{100 * statistics.fmean(values):{sign}z.2f}" + spread([100 * v for v in values], f"{sign}z.2f", ".2f")


def plain(values: list[float]) -> str:
    """The mean of numbers, with its spread."""
    if not all(map(math.isfinite, values)):
        return readable(sum(values) / len(values))  # infinite, or NaN
    return readable(statistics.fmean(values)) + spread(values)


def spread(values: list[float], form: str | None = None, half_form: str | None = None) -> str:
    """The 95 % confidence interval from three values on; of two, both of them.

    With one degree of freedom Student's interval is 13 times the standard error, which tells less than the two values.

    Args:
        values: whose mean is shown before it.
        form: format specification of a value; ``None`` for `readable` numbers.
        half_form: that of half the interval.
    """
    if len(values) == 2:
        low, high = (readable(v) if form is None else format(v, form) for v in sorted(values))
        return f" ({low} to {high})"
    if (half := interval(values)) is None:
        return ""
    return f" ± {readable(half) if half_form is None else format(half, half_form)}"


def readable(value: float) -> str:
    """A number in a readable format."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """``40 s``, ``25 min`` or ``3.1 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mean(values: list[float], form: str) -> str:
    """The mean in this format specification; empty where there are no values."""
    return format(statistics.fmean(values), form) if values else ""
